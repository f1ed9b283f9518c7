"""Mistral (Magistral, Small 4): `[THINK]...[/THINK]`."""

from __future__ import annotations

from phloem.text.thinking._base import ThinkingParser


class Parser(ThinkingParser):
    start = "[THINK]"
    end = "[/THINK]"
    jumps = ("[TOOL_CALLS]",)
