"""DeepSeek R1: an answer begins inside the block, whether or not `<think>` is written."""

from __future__ import annotations

from phloem.text.thinking._base import ThinkingParser


class Parser(ThinkingParser):
    always = True
