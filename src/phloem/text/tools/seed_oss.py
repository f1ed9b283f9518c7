"""Seed-OSS: Qwen3-Coder's elements in a frame of their own, `<seed:tool_call>`."""

from __future__ import annotations

from phloem.text.shown import Shown
from phloem.text.tools import qwen3_coder

SHOWN_BY = (Shown("<seed:tool_call>"),)
BEFORE = ("qwen3_coder", "hermes")

BEGIN, END = "<seed:tool_call>", "</seed:tool_call>"


class Parser(qwen3_coder.Parser):
    frame = (BEGIN, END)
    begins = (BEGIN, qwen3_coder.FUNCTION)
    trigger = BEGIN
