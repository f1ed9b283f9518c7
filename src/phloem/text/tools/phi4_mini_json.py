"""Phi-4-mini as its model card has it: `functools[{"name": ..., "arguments": {...}}, ...]`."""

from __future__ import annotations

from phloem.text.shown import Shown
from phloem.text.tools._array import ArrayReader

NAMES = ("phi4_functools",)
SHOWN_BY = (Shown("functools["),)
BEFORE = ("granite",)


class Parser(ArrayReader):
    begins = ("functools",)
    trigger = "functools"
