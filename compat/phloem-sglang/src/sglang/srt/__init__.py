"""The runtime's names."""

from sglang._missing import missing

__getattr__ = missing(__name__)
