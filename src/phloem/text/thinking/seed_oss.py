"""Seed-OSS: `<seed:think>...</seed:think>`."""

from __future__ import annotations

from phloem.text.shown import Shown
from phloem.text.thinking._base import ThinkingParser

SHOWN_BY = (Shown("<seed:think>"),)
BEFORE = ("qwen3",)


class Parser(ThinkingParser):
    start = "<seed:think>"
    end = "</seed:think>"
    jumps = ("<seed:tool_call>",)
