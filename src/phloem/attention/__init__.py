"""Attention backends: the file name is the backend's name."""
