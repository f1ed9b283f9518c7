"""OLMo 3: `<function_calls>f(a=1, b="x")\\ng()</function_calls>`, a call on each line, its arguments JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING

from phloem.text.shown import Shown
from phloem.text.tools import pythonic
from phloem.text.tools._base import ToolParser
from phloem.text.tools._grammar import Shape, calls, tag

if TYPE_CHECKING:
    from collections.abc import Iterable

    from phloem.text.tools._base import Steps

SHOWN_BY = (Shown("<function_calls>", "</function_calls>"),)
BEFORE = ("hermes", "pythonic", "llama3")

BEGIN, END = "<function_calls>", "</function_calls>"


class Parser(pythonic.Parser):
    begins = (BEGIN,)
    end = END
    lead = ""
    trigger = BEGIN
    sections = True

    def section(self, marker: str) -> Steps[None]:
        yield from self.spaces()
        while True:
            yield from self.with_json()
            if (yield from self.optional(END)) or not self._buffer[self._at :].strip():
                return
            yield from self.spaces()

    def structure(self, names: Iterable[str] | None = None, required: bool = False, parallel: bool = True) -> Shape:
        listed = calls([self.one_call(name) for name in self.chosen(names)], "\n", parallel)
        return self.framed([tag(BEGIN, listed, END)], required, parallel)

    def instead(self, answer: Shape, names: Iterable[str] | None = None, parallel: bool = True) -> Shape:
        return ToolParser.instead(self, answer, names, parallel)
