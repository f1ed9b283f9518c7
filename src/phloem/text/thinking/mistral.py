"""Mistral (Magistral, Small 4): `[THINK]...[/THINK]`."""

from __future__ import annotations

from phloem.text.shown import Shown
from phloem.text.thinking._base import ThinkingParser

NAMES = ("magistral",)
SHOWN_BY = (Shown("[THINK]"),)


class Parser(ThinkingParser):
    start = "[THINK]"
    end = "[/THINK]"
    jumps = ("[TOOL_CALLS]",)
