"""Step 3: a section of calls, each `function`, a separator and an invocation in `steptml` tags."""

from __future__ import annotations

from typing import TYPE_CHECKING

from phloem.text.shown import Shown
from phloem.text.tools._base import Malformed
from phloem.text.tools._grammar import Shape, tag
from phloem.text.tools._xml import InvokeReader

if TYPE_CHECKING:
    from phloem.text.tools._base import Steps

SHOWN_BY = (Shown("<steptml:invoke"),)
BEFORE = ("hermes",)

SECTION, SECTION_END = "<｜tool_calls_begin｜>", "<｜tool_calls_end｜>"
CALL, SEPARATOR, CALL_END = "<｜tool_call_begin｜>", "<｜tool_sep｜>", "<｜tool_call_end｜>"


class Parser(InvokeReader):
    begins = (SECTION,)
    prefix = "steptml:"
    trigger = SECTION
    style = "step_xml"
    closing = "</steptml:parameter>"
    frame = (SECTION, SECTION_END)

    def invocation(self, name: str) -> Shape:
        return tag(f"{CALL}function{SEPARATOR}", super().invocation(name), CALL_END)

    def section(self, marker: str) -> Steps[None]:
        yield from self.spaces()
        yield from self.skip(CALL)
        while True:
            kind, _ = yield from self.until(SEPARATOR, limit=32)
            if kind.strip() != "function":
                raise Malformed
            yield from self.spaces()
            yield from self.skip("<steptml:invoke")
            yield from self.invoke()
            yield from self.optional(CALL_END)
            self._safe = self._at
            if not (yield from self.optional(CALL)):
                break
        yield from self.optional(SECTION_END)
