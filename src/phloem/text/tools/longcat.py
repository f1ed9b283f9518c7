"""LongCat: Hermes' calls between marks of its own, `<longcat_tool_call>`."""

from __future__ import annotations

from phloem.text.shown import Shown
from phloem.text.tools._json import MarkedReader

SHOWN_BY = (Shown("<longcat_tool_call>"),)
BEFORE = ("hermes",)

BEGIN, END = "<longcat_tool_call>", "</longcat_tool_call>"


class Parser(MarkedReader):
    begins = (BEGIN,)
    trigger = BEGIN
    end = END
