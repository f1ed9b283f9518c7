"""Qwen 3: `<think>...</think>`, if thinking is enabled."""

from __future__ import annotations

from phloem.text.thinking._base import ThinkingParser


class Parser(ThinkingParser):
    jumps = ("<tool_call>",)
