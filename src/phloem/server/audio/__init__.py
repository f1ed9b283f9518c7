"""Routes of models of speech."""
