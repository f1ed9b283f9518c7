"""Step 3: an answer begins inside the block."""

from __future__ import annotations

from phloem.text.shown import Shown
from phloem.text.thinking._base import ThinkingParser

SHOWN_BY = (
    Shown("<steptml:invoke", "<think>"),
    Shown("<｜tool_calls_begin｜>", "<think>"),
)
BEFORE = ("deepseek_r1", "deepseek_v3", "qwen3")


class Parser(ThinkingParser):
    always = True
    jumps = ("<｜tool_calls_begin｜>",)
