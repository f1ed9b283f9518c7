"""OLMo 3: `<function_calls>f(a=1, b="x")\\ng()</function_calls>`, a call on each line, its arguments JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING

from phloem.text.shown import Shown
from phloem.text.tools._marked import Marked

if TYPE_CHECKING:
    from phloem.text.tools._base import Steps

SHOWN_BY = (Shown("<function_calls>", "</function_calls>"),)
BEFORE = ("hermes", "pythonic", "llama3")

BEGIN, END = "<function_calls>", "</function_calls>"


class Parser(Marked):
    begins = (BEGIN,)
    end = END
    trigger = BEGIN
    between = "\n"

    def section(self, marker: str) -> Steps[None]:
        yield from self.spaces()
        while True:
            yield from self.with_json()
            if (yield from self.optional(END)) or not self._buffer[self._at :].strip():
                return
            yield from self.spaces()
