"""Kimi K2 Thinking: `<think>...</think>`; a section of tool calls may begin inside it."""

from __future__ import annotations

from phloem.text.thinking._base import ThinkingParser


class Parser(ThinkingParser):
    jumps = ("<|tool_calls_section_begin|>",)
