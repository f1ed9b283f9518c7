"""LongCat: Hermes' calls between marks of its own, `<longcat_tool_call>`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from phloem.text.shown import Shown
from phloem.text.tools._json import JsonReader

if TYPE_CHECKING:
    from phloem.text.tools._base import Steps

SHOWN_BY = (Shown("<longcat_tool_call>"),)
BEFORE = ("hermes",)

BEGIN, END = "<longcat_tool_call>", "</longcat_tool_call>"


class Parser(JsonReader):
    begins = (BEGIN,)
    trigger = BEGIN

    def section(self, marker: str) -> Steps[None]:
        yield from self.spaces()
        yield from self.named_object()
        yield from self.optional(END)

    def tag(self, name: str) -> tuple[str, str]:
        return f'{BEGIN}\n{{"name": "{name}", "arguments": ', f"}}\n{END}"
