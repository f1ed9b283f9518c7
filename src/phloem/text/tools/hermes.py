"""Hermes, Qwen 2.5 and Qwen 3: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, once per call."""

from __future__ import annotations

from typing import TYPE_CHECKING

from phloem.text.shown import Shown
from phloem.text.tools._json import JsonReader

if TYPE_CHECKING:
    from phloem.text.tools._base import Steps

NAMES = ("qwen", "qwen2", "qwen25", "qwen3", "granite4")
SHOWN_BY = (Shown("<tool_call>", "arguments"),)
BEFORE = ("pythonic", "llama3")

BEGIN, END = "<tool_call>", "</tool_call>"


class Parser(JsonReader):
    begins = (BEGIN,)
    trigger = BEGIN

    def section(self, marker: str) -> Steps[None]:
        yield from self.spaces()
        yield from self.named_object()
        yield from self.optional(END)

    def tag(self, name: str) -> tuple[str, str]:
        return f'{BEGIN}\n{{"name": "{name}", "arguments": ', f"}}\n{END}"
