"""Apertus: `<|tools_prefix|>[{"f": {...}}, ...]<|tools_suffix|>`, functions by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from phloem.text.shown import Shown
from phloem.text.tools._array import ArrayReader

if TYPE_CHECKING:
    from phloem.text.tools._base import Steps

NAMES = ("apertus2509",)
SHOWN_BY = (Shown("<|tools_prefix|>"),)


class Parser(ArrayReader):
    begins = ("<|tools_prefix|>",)
    trigger = "<|tools_prefix|>"
    close = enforced_close = "<|tools_suffix|>"

    def named_object(self, call_id: str | None = None) -> Steps[None]:
        yield from self.skip("{")
        yield from self.spaces()
        name = yield from self.text_of_string()
        yield from self.spaces()
        yield from self.skip(":")
        yield from self.spaces()
        call = self.begin_call(name, call_id)
        yield from self.arguments(call)
        yield from self.spaces()
        yield from self.skip("}")
        call.end()

    def item(self, name: str) -> tuple[str, str]:
        return f'{{"{name}": ', "}"
