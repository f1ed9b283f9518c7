"""Layers: only what clients read of answers."""

from sglang._missing import missing

__getattr__ = missing(__name__)
