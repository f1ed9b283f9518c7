"""Qwen3-Coder: `<tool_call><function=f><parameter=k>v</parameter></function></tool_call>`.

The outer tag is left out at times.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from phloem.server.tools._base import MAX_NAME
from phloem.server.tools._xml import XmlReader

if TYPE_CHECKING:
    from phloem.server.tools._base import Steps

BEGIN, END = "<tool_call>", "</tool_call>"
FUNCTION, FUNCTION_END = "<function=", "</function>"
PARAMETER, PARAMETER_END = "<parameter=", "</parameter>"


class Parser(XmlReader):
    begins = (BEGIN, FUNCTION)
    trigger = BEGIN
    style = "qwen_xml"
    newlines = True

    def section(self, marker: str) -> Steps[None]:
        if marker == BEGIN:
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
        yield from self.optional(END)

    def tag(self, name: str) -> tuple[str, str]:
        return f"{BEGIN}\n{FUNCTION}{name}>\n", f"\n{FUNCTION_END}\n{END}"
