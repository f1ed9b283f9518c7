"""Qwen3-Coder: `<tool_call><function=f><parameter=k>v</parameter></function></tool_call>`.

The outer tag is left out at times.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from phloem.text.shown import Shown
from phloem.text.tools._base import MAX_NAME
from phloem.text.tools._grammar import Shape, either, literal, sequence, tag, triggered
from phloem.text.tools._xml import XmlReader

if TYPE_CHECKING:
    from collections.abc import Iterable

    from phloem.text.tools._base import Steps

NAMES = ("step3p5", "qwen3coder", "qwen3_xml", "mimo")
SHOWN_BY = (Shown("<function=", "<parameter="),)
BEFORE = ("hermes",)

BEGIN, END = "<tool_call>", "</tool_call>"
FUNCTION, FUNCTION_END = "<function=", "</function>"
PARAMETER, PARAMETER_END = "<parameter=", "</parameter>"


class Parser(XmlReader):
    frame: ClassVar[tuple[str, str]] = (BEGIN, END)
    begins = (BEGIN, FUNCTION)
    trigger = BEGIN
    style = "qwen_xml"
    newlines = True
    pad = "\n"
    closing = PARAMETER_END

    def section(self, marker: str) -> Steps[None]:
        if marker == self.frame[0]:
            yield from self.spaces()
            yield from self.skip(FUNCTION)
        name, _ = yield from self.until(">", limit=MAX_NAME)
        call = self.begin(name.strip())
        while True:
            yield from self.spaces()
            if (yield from self.accept(FUNCTION_END)):
                break
            yield from self.skip(PARAMETER)
            key, _ = yield from self.until(">", limit=MAX_NAME)
            yield from self.parameter(call, key.strip(), PARAMETER_END)
        self.complete(call)
        yield from self.optional(self.frame[1])

    def opening(self, key: str, is_string: bool, line: str) -> str:
        return f"{PARAMETER}{key}>"

    def structure(self, names: Iterable[str] | None = None, required: bool = False, parallel: bool = True) -> Shape:
        made = [
            sequence(literal(f"{name}>\n"), *self.elements(name), literal(FUNCTION_END)) for name in self.chosen(names)
        ]
        begin, end = self.frame
        framed = tag(f"{begin}\n{FUNCTION}", either(made), f"\n{end}")
        if required:
            return self.framed([framed], True, parallel)
        return triggered((begin, FUNCTION), [framed, tag(FUNCTION, either(made), "")], not parallel)

    def tag(self, name: str) -> tuple[str, str]:
        return f"{self.frame[0]}\n{FUNCTION}{name}>\n", f"\n{FUNCTION_END}\n{self.frame[1]}"
