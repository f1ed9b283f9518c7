"""Granite 3.2 and 3.3: sentences around the two parts of an answer."""

from __future__ import annotations

from phloem.text.shown import Shown
from phloem.text.thinking._base import ThinkingParser

SHOWN_BY = (Shown("Here is my thought process:"),)
BEFORE = ("qwen3",)


class Parser(ThinkingParser):
    start = "Here is my thought process:"
    end = "Here is my response:"
