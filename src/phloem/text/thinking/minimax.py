"""MiniMax M2: the prompt opens the block; a tool call may begin inside it."""

from __future__ import annotations

from phloem.text.thinking._base import ThinkingParser


class Parser(ThinkingParser):
    always = True
    jumps = ("<minimax:tool_call>",)
