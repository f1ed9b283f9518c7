"""Step 3: an answer begins inside the block."""

from __future__ import annotations

from phloem.text.thinking._base import ThinkingParser


class Parser(ThinkingParser):
    always = True
    jumps = ("<｜tool_calls_begin｜>",)
