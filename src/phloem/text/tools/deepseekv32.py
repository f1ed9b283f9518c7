"""DeepSeek V3.2: a section of invocations in its own markup, whose parameters say whether they are strings."""

from __future__ import annotations

from typing import TYPE_CHECKING

from phloem.text.shown import Shown
from phloem.text.tools._xml import InvokeReader

if TYPE_CHECKING:
    from phloem.text.tools._base import Steps

NAMES = ("deepseek_v32",)
SHOWN_BY = (Shown("｜DSML｜"),)
BEFORE = ("deepseekv3", "deepseekv31")

MARK = "｜DSML｜"
BEGIN, END = f"<{MARK}function_calls>", f"</{MARK}function_calls>"


class Parser(InvokeReader):
    begins = (BEGIN,)
    trigger = BEGIN
    style = "deepseek_xml"
    prefix = MARK
    tells_strings = True
    closing = f"</{MARK}parameter>"
    frame = (BEGIN, END)

    def section(self, marker: str) -> Steps[None]:
        yield from self.invokes(END)

    def tag(self, name: str) -> tuple[str, str]:
        return f'{BEGIN}\n<{MARK}invoke name="{name}">\n', f"\n</{MARK}invoke>\n{END}"
