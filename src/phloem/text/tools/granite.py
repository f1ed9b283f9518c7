"""Granite 3, Phi-4-mini: `<|tool_call|>[{"name": ..., "arguments": {...}}, ...]`; 3.1 writes `<tool_call>`."""

from __future__ import annotations

from phloem.text.shown import Shown
from phloem.text.tools._array import ArrayReader

NAMES = ("granite3", "phi4_mini")
SHOWN_BY = (Shown("<|tool_call|>"),)
BEFORE = ("hermes",)


class Parser(ArrayReader):
    begins = ("<|tool_call|>", "<tool_call>")
    trigger = "<|tool_call|>"
    close = "<|/tool_call|>"
