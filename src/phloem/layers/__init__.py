"""Floor 2: the layers that models are built from."""
