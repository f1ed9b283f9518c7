"""MiniMax M2: `<minimax:tool_call><invoke name="f"><parameter name="k">v</parameter></invoke></minimax:tool_call>`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from phloem.text.shown import Shown
from phloem.text.tools._xml import InvokeReader

if TYPE_CHECKING:
    from phloem.text.tools._base import Steps

NAMES = ("minimax",)
SHOWN_BY = (Shown("<minimax:tool_call>"),)
BEFORE = ("hermes",)

BEGIN, END = "<minimax:tool_call>", "</minimax:tool_call>"


class Parser(InvokeReader):
    begins = (BEGIN,)
    trigger = BEGIN
    style = "minimax_xml"
    newlines = True
    closing = "</parameter>"
    frame = (BEGIN, END)

    def section(self, marker: str) -> Steps[None]:
        yield from self.invokes(END)

    def tag(self, name: str) -> tuple[str, str]:
        return f'{BEGIN}\n<invoke name="{name}">\n', f"\n</invoke>\n{END}"
