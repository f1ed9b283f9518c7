"""Training of what drafts (EAGLE-3 heads, DFlash drafters), for models that are served here: `phloem train-draft`."""
