"""What is decided of a model before its weights are read or anything runs."""
