"""Where the classes of serialised weights are now."""

from sglang._missing import missing

__getattr__ = missing(__name__)
