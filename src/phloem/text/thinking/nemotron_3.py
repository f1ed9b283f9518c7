"""Nemotron 3: `<think>...</think>`; a tool call may begin inside it."""

from __future__ import annotations

from phloem.text.thinking._base import ThinkingParser


class Parser(ThinkingParser):
    jumps = ("<tool_call>",)
