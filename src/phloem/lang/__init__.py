"""The frontend language."""
