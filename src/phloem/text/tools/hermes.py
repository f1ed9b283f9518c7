"""Hermes, Qwen 2.5 and Qwen 3: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, once per call."""

from __future__ import annotations

from phloem.text.shown import Shown
from phloem.text.tools._json import MarkedReader

NAMES = ("qwen", "qwen2", "qwen25", "qwen3", "granite4")
SHOWN_BY = (Shown("<tool_call>", "arguments"),)
BEFORE = ("pythonic", "llama3")

BEGIN, END = "<tool_call>", "</tool_call>"


class Parser(MarkedReader):
    begins = (BEGIN,)
    trigger = BEGIN
    end = END
