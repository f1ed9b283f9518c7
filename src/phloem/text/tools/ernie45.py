"""ERNIE 4.5 (thinking): calls as in Hermes' format, after the reasoning."""

from __future__ import annotations

from phloem.text.shown import Shown
from phloem.text.tools.hermes import Parser

NAMES = ("ernie",)
SHOWN_BY = (Shown("<tool_call>", "<response>"),)
BEFORE = ("hermes",)

__all__ = ["Parser"]
