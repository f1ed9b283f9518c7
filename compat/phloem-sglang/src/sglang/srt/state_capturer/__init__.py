"""Weights on their way to an engine."""

from sglang._missing import missing

__getattr__ = missing(__name__)
