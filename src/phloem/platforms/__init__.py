"""One file per kind of machine."""
