"""Constrained decoding: one file per engine of structure."""
