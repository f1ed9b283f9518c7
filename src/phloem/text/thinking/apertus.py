"""Apertus: `<|inner_prefix|>...<|inner_suffix|>`."""

from __future__ import annotations

from phloem.text.shown import Shown
from phloem.text.thinking._base import ThinkingParser

NAMES = ("apertus2509",)
SHOWN_BY = (Shown("<|inner_prefix|>"),)
BEFORE = ("qwen3",)


class Parser(ThinkingParser):
    start = "<|inner_prefix|>"
    end = "<|inner_suffix|>"
    jumps = ("<|tools_prefix|>",)
