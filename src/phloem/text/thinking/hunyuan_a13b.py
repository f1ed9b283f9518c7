"""Hunyuan-A13B: `<think>...</think>`, the content in `<answer>` tags."""

from __future__ import annotations

from phloem.text.shown import Shown
from phloem.text.thinking._wrapped import Wrapped

SHOWN_BY = (Shown("<answer>", "think>"),)
BEFORE = ("qwen3",)


class Parser(Wrapped):
    wraps = ("<answer>", "</answer>")
    jumps = ("<tool_calls>",)
