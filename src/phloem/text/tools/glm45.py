"""GLM 4.5 to 4.7: `<tool_call>f<arg_key>k</arg_key><arg_value>v</arg_value></tool_call>`, with or without newlines."""

from __future__ import annotations

from typing import TYPE_CHECKING

from phloem.text.shown import Shown
from phloem.text.tools._base import MAX_NAME
from phloem.text.tools._grammar import Shape, either, literal, sequence, tag
from phloem.text.tools._xml import XmlReader

if TYPE_CHECKING:
    from collections.abc import Iterable

    from phloem.text.tools._base import Steps

NAMES = ("glm", "glm47")
SHOWN_BY = (Shown("<tool_call>", "<arg_key>"),)
BEFORE = ("hermes",)

BEGIN, END = "<tool_call>", "</tool_call>"
KEY, KEY_END, VALUE, VALUE_END = "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"


class Parser(XmlReader):
    begins = (BEGIN,)
    trigger = BEGIN
    style = "glm_xml"
    closing = VALUE_END

    def section(self, marker: str) -> Steps[None]:
        name, end = yield from self.until(KEY, END, limit=2 * MAX_NAME)
        call = self.begin(name.strip())
        while end == KEY:
            key, _ = yield from self.until(KEY_END, limit=MAX_NAME)
            yield from self.spaces()
            yield from self.skip(VALUE)
            yield from self.parameter(call, key.strip(), VALUE_END)
            yield from self.spaces()
            if (yield from self.accept(KEY)):
                continue
            yield from self.skip(END)
            break
        self.complete(call)

    def opening(self, key: str, is_string: bool, line: str) -> str:
        return f"{KEY}{key}{KEY_END}{line}{VALUE}"

    def structure(self, names: Iterable[str] | None = None, required: bool = False, parallel: bool = True) -> Shape:
        # 4.5 writes line breaks between the elements, 4.7 does not.
        made: list[Shape] = []
        for name in self.chosen(names):
            split = sequence(literal("\n"), *self.elements(name, "\n"), literal(END))
            made.append(sequence(literal(name), either([split, sequence(*self.elements(name, ""), literal(END))])))
        return self.framed([tag(BEGIN, either(made), "")], required, parallel)

    def tag(self, name: str) -> tuple[str, str]:
        return f"{BEGIN}{name}\n", f"\n{END}"
