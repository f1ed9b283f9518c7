"""Kimi K2: a section of calls whose ids are `functions.<name>:<number>`, each with its arguments as JSON."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from phloem.text.shown import Shown
from phloem.text.tools._base import MAX_NAME, Malformed
from phloem.text.tools._grammar import Shape, calls, sequence, tag
from phloem.text.tools._json import JsonReader

if TYPE_CHECKING:
    from collections.abc import Iterable

    from phloem.text.tools._base import Steps

NAMES = ("kimi",)
SHOWN_BY = (Shown("<|tool_calls_section_begin|>"),)
BEFORE = ("hermes",)

SECTION, SECTION_END = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
CALL, ARGUMENTS, CALL_END = "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"
_ID = re.compile(r"(?:functions\.)?(?P<name>[\w.\-]+):\d+")


class Parser(JsonReader):
    begins = (SECTION,)
    trigger = SECTION
    sections = True

    def section(self, marker: str) -> Steps[None]:
        yield from self.spaces()
        yield from self.skip(CALL)
        while True:
            text, _ = yield from self.until(ARGUMENTS, limit=MAX_NAME)
            found = _ID.fullmatch(text.strip())
            if found is None:
                raise Malformed
            call = self.begin_call(found["name"], text.strip())
            yield from self.spaces()
            yield from self.arguments(call)
            call.end()
            yield from self.optional(CALL_END)
            self._safe = self._at
            if not (yield from self.optional(CALL)):
                break
        yield from self.optional(SECTION_END)

    def structure(self, names: Iterable[str] | None = None, required: bool = False, parallel: bool = True) -> Shape:
        number = {"type": "regex", "pattern": "[0-9]{1,4}"}
        made = [
            sequence(tag(f"{CALL}functions.{name}:", number, ARGUMENTS), tag("", self.written(name), CALL_END))
            for name in self.chosen(names)
        ]
        section = tag(SECTION, calls(made, "", parallel), SECTION_END)
        return self.framed([section], required, parallel)

    def tag(self, name: str) -> tuple[str, str]:
        return f"{SECTION}{CALL}functions.{name}:0{ARGUMENTS}", f"{CALL_END}{SECTION_END}"
