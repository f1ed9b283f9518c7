"""Qwen 3: `<think>...</think>`, if thinking is enabled."""

from __future__ import annotations

from phloem.text.shown import Shown
from phloem.text.thinking._base import ThinkingParser

NAMES = ("interns1", "qwen", "olmo3", "exaone4", "smollm3", "mimo")
SHOWN_BY = (
    Shown("<|im_start|>", "think>", "enable_thinking"),
    Shown("think>"),
)


class Parser(ThinkingParser):
    jumps = ("<tool_call>",)
