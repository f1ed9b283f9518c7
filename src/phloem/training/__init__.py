"""Training of heads that draft (EAGLE-3), for models that are served here: `phloem train-draft`."""
