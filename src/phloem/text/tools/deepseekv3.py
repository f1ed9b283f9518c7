"""DeepSeek V3 and R1: a section of calls, each `function`, a separator, the name and a fenced JSON block."""

from __future__ import annotations

from typing import TYPE_CHECKING

from phloem.text.shown import Shown
from phloem.text.tools._base import MAX_NAME
from phloem.text.tools._grammar import Shape, calls, tag
from phloem.text.tools._json import JsonReader

if TYPE_CHECKING:
    from collections.abc import Iterable

    from phloem.text.tools._base import Steps

NAMES = ("deepseek_v3",)
SHOWN_BY = (Shown("<｜tool▁calls▁begin｜>", "```json"),)
BEFORE = ("deepseekv31",)

SECTION, SECTION_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL, SEPARATOR, CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"


class Parser(JsonReader):
    begins = (SECTION,)
    trigger = SECTION
    sections = True

    def section(self, marker: str) -> Steps[None]:
        yield from self.spaces()
        yield from self.skip(CALL)
        while True:
            yield from self.one_call()
            yield from self.optional(CALL_END)
            self._safe = self._at
            if not (yield from self.optional(CALL)):
                break
        yield from self.optional(SECTION_END)

    def one_call(self) -> Steps[None]:
        yield from self.until(SEPARATOR, limit=32)
        name, _ = yield from self.until("\n", limit=MAX_NAME)
        call = self.begin_call(name.strip())
        yield from self.spaces()
        yield from self.skip("```json")
        yield from self.spaces()
        yield from self.arguments(call)
        call.end()
        yield from self.optional("```")

    def call(self, name: str) -> Shape:
        return tag(f"{CALL}function{SEPARATOR}{name}\n```json\n", self.written(name), f"\n```{CALL_END}")

    def structure(self, names: Iterable[str] | None = None, required: bool = False, parallel: bool = True) -> Shape:
        made = calls([self.call(name) for name in self.chosen(names)], self.between, parallel)
        return self.framed([tag(SECTION, made, SECTION_END)], required, parallel)

    def tag(self, name: str) -> tuple[str, str]:
        begin = f"{SECTION}{CALL}function{SEPARATOR}{name}\n```json\n"
        return begin, f"\n```{CALL_END}{SECTION_END}"
