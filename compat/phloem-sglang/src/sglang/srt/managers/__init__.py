"""The engine's parts, as far as trainers call them."""

from sglang._missing import missing

__getattr__ = missing(__name__)
