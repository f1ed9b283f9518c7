"""Jamba, Hunyuan-A13B: `<tool_calls>[{"name": ..., "arguments": {...}}, ...]</tool_calls>`, all calls in one array."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from phloem.text.shown import Shown
from phloem.text.tools._grammar import Shape, calls, tag
from phloem.text.tools._json import JsonReader

if TYPE_CHECKING:
    from phloem.text.tools._base import Steps

NAMES = ("jamba_1_5", "hunyuan_a13b")
SHOWN_BY = (Shown("<tool_calls>", "</tool_calls>"),)

BEGIN, END = "<tool_calls>", "</tool_calls>"


class Parser(JsonReader):
    begins = (BEGIN,)
    trigger = BEGIN

    def section(self, marker: str) -> Steps[None]:
        yield from self.spaces()
        yield from self.named_objects()
        yield from self.optional(END)

    def structure(self, names: Iterable[str] | None = None, required: bool = False, parallel: bool = True) -> Shape:
        listed = [tag(f'{{"name": "{name}", "arguments": ', self.written(name), "}") for name in self.chosen(names)]
        array = tag(f"{BEGIN}[\n    ", calls(listed, ",\n    ", parallel), f"\n]{END}")
        return self.framed([array], required, parallel)

    def tag(self, name: str) -> tuple[str, str]:
        return f'{BEGIN}[\n    {{"name": "{name}", "arguments": ', f"}}\n]{END}"
