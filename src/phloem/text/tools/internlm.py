"""InternLM 2 and Intern-S1: `<|action_start|><|plugin|>{"name": ..., "parameters": {...}}<|action_end|>`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from phloem.text.shown import Shown
from phloem.text.tools._json import JsonReader

if TYPE_CHECKING:
    from phloem.text.tools._base import Steps

NAMES = ("interns1", "intern_s1", "internlm2")
SHOWN_BY = (Shown("<|action_start|>"),)
BEFORE = ("hermes",)

BEGIN, END = "<|action_start|><|plugin|>", "<|action_end|>"


class Parser(JsonReader):
    begins = (BEGIN, "<|action_start|> <|plugin|>")
    trigger = "<|action_start|>"

    def section(self, marker: str) -> Steps[None]:
        yield from self.spaces()
        yield from self.named_object()
        yield from self.optional(END)

    def tag(self, name: str) -> tuple[str, str]:
        return f'{BEGIN}\n{{"name": "{name}", "parameters": ', f"}}{END}"
