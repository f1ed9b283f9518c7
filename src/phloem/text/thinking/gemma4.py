"""Gemma 4: `<|channel>thought`, a line break, the reasoning, `<channel|>`."""

from __future__ import annotations

from phloem.text.shown import Shown
from phloem.text.thinking._base import ThinkingParser

SHOWN_BY = (Shown("<|channel>", "<channel|>"),)
BEFORE = ("qwen3",)


class Parser(ThinkingParser):
    start = "<|channel>thought"
    end = "<channel|>"
    jumps = ("<|tool_call>",)
