"""LongCat: `<longcat_think>...</longcat_think>`."""

from __future__ import annotations

from phloem.text.shown import Shown
from phloem.text.thinking._base import ThinkingParser

SHOWN_BY = (Shown("<longcat_think>"),)
BEFORE = ("qwen3",)


class Parser(ThinkingParser):
    start = "<longcat_think>"
    end = "</longcat_think>"
    jumps = ("<longcat_tool_call>",)
