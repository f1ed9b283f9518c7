"""Kimi (k1.5, VL): a block between markers of its own."""

from __future__ import annotations

from phloem.text.shown import Shown
from phloem.text.thinking._base import ThinkingParser

SHOWN_BY = (Shown("◁think▷"),)


class Parser(ThinkingParser):
    start = "◁think▷"
    end = "◁/think▷"
