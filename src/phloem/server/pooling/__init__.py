"""Routes of models that do not generate."""
