"""Model families: the file name is the `model_type`."""
