"""Where the classes of serialised weights were first."""

from sglang._missing import missing

__getattr__ = missing(__name__)
