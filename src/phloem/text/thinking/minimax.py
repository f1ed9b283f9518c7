"""MiniMax M2: the prompt opens the block; a tool call may begin inside it."""

from __future__ import annotations

from phloem.text.shown import Shown
from phloem.text.thinking._base import ThinkingParser

NAMES = ("minimax_m2",)
SHOWN_BY = (Shown("<minimax:tool_call>", "<think>"),)
BEFORE = ("qwen3",)


class Parser(ThinkingParser):
    always = True
    jumps = ("<minimax:tool_call>",)
