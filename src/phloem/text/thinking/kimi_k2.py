"""Kimi K2 Thinking: `<think>...</think>`; a section of tool calls may begin inside it."""

from __future__ import annotations

from phloem.text.shown import Shown
from phloem.text.thinking._base import ThinkingParser

SHOWN_BY = (Shown("<|tool_calls_section_begin|>", "think>"),)
BEFORE = ("qwen3",)


class Parser(ThinkingParser):
    jumps = ("<|tool_calls_section_begin|>",)
