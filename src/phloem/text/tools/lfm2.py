"""LFM2: `<|tool_call_start|>[f(a=1, b="x"), g()]<|tool_call_end|>`, the arguments Python literals."""

from __future__ import annotations

from typing import TYPE_CHECKING

from phloem.text.shown import Shown
from phloem.text.tools import pythonic
from phloem.text.tools._base import ToolParser
from phloem.text.tools._grammar import Shape, calls, tag

if TYPE_CHECKING:
    from collections.abc import Iterable

SHOWN_BY = (Shown("<|tool_call_start|>"), Shown("<|tool_list_start|>"))
BEFORE = ("hermes", "pythonic", "llama3")

BEGIN, END = "<|tool_call_start|>", "<|tool_call_end|>"


class Parser(pythonic.Parser):
    begins = (BEGIN,)
    end = END
    lead = ""
    trigger = BEGIN
    sections = True

    def structure(self, names: Iterable[str] | None = None, required: bool = False, parallel: bool = True) -> Shape:
        listed = calls([self.one_call(name) for name in self.chosen(names)], ", ", parallel)
        return self.framed([tag(f"{BEGIN}[", listed, f"]{END}")], required, parallel)

    def instead(self, answer: Shape, names: Iterable[str] | None = None, parallel: bool = True) -> Shape:
        return ToolParser.instead(self, answer, names, parallel)
