"""DeepSeek V3.1: a section of calls, each the name, a separator and the arguments as bare JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING

from phloem.text.shown import Shown
from phloem.text.tools._base import MAX_NAME
from phloem.text.tools._grammar import Shape, tag
from phloem.text.tools.deepseekv3 import CALL, CALL_END, SECTION, SECTION_END, SEPARATOR
from phloem.text.tools.deepseekv3 import Parser as V3

if TYPE_CHECKING:
    from phloem.text.tools._base import Steps

NAMES = ("deepseek_v31",)
SHOWN_BY = (Shown("<｜tool▁calls▁begin｜>"),)


class Parser(V3):
    between = ""

    def one_call(self) -> Steps[None]:
        name, _ = yield from self.until(SEPARATOR, limit=MAX_NAME)
        call = self.begin_call(name.strip())
        yield from self.spaces()
        yield from self.arguments(call)
        call.end()

    def call(self, name: str) -> Shape:
        return tag(f"{CALL}{name}{SEPARATOR}", self.written(name), CALL_END)

    def tag(self, name: str) -> tuple[str, str]:
        return f"{SECTION}{CALL}{name}{SEPARATOR}", f"{CALL_END}{SECTION_END}"
