"""DeepSeek V3.1 and later: hybrid models; the prompt opens or closes the block."""

from __future__ import annotations

from phloem.text.thinking._base import ThinkingParser


class Parser(ThinkingParser):
    jumps = ("<｜tool▁calls▁begin｜>", "<｜DSML｜function_calls>")
