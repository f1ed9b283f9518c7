"""DeepSeek R1: an answer begins inside the block, whether or not `<think>` is written."""

from __future__ import annotations

from phloem.text.shown import Shown
from phloem.text.thinking._base import ThinkingParser

NAMES = ("deepseekr1", "step3p5")
SHOWN_BY = (Shown("<｜Assistant｜>", "think>"),)
BEFORE = ("qwen3",)


class Parser(ThinkingParser):
    always = True
