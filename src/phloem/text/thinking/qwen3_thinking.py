"""Qwen 3 thinking models: the block is opened by the prompt."""

from __future__ import annotations

from phloem.text.shown import Shown
from phloem.text.thinking.qwen3 import Parser as Qwen3

SHOWN_BY = (Shown("<|im_start|>", "<think>\\n' }}", absent=("enable_thinking",)),)
BEFORE = ("qwen3",)


class Parser(Qwen3):
    always = True
