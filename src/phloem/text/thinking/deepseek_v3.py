"""DeepSeek V3.1 and later: hybrid models; the prompt opens or closes the block."""

from __future__ import annotations

from phloem.text.shown import Shown
from phloem.text.thinking._base import ThinkingParser

NAMES = ("deepseek_v31", "deepseek_v32", "deepseekv3", "deepseekv31", "deepseekv32")
SHOWN_BY = (Shown("<｜Assistant｜>", "think>", "thinking"),)
BEFORE = ("deepseek_r1", "qwen3")


class Parser(ThinkingParser):
    jumps = ("<｜tool▁calls▁begin｜>", "<｜DSML｜function_calls>")
