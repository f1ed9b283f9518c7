"""Llama 3.1 to 3.3: `{"name": ..., "parameters": {...}}` as the whole answer, several joined by `;`.

A `<|python_tag|>` may stand before it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from phloem.text.shown import Shown
from phloem.text.tools._base import Ended
from phloem.text.tools._grammar import Shape, calls, either, json_of, literal, optional, sequence, tag, triggered
from phloem.text.tools._json import JsonReader

if TYPE_CHECKING:
    from collections.abc import Iterable

    from phloem.text.tools._base import Steps

NAMES = ("llama", "llama3_json", "llama32")
SHOWN_BY = (
    Shown("<|start_header_id|>", '"parameters": '),
    Shown("<|python_tag|>"),
)

TAG = "<|python_tag|>"


class Parser(JsonReader):
    begins = (TAG,)
    lead = "{"

    def section(self, marker: str) -> Steps[None]:
        yield from self.spaces()
        while True:
            yield from self.named_object()
            if not (yield from self._separator()):
                return

    def _separator(self) -> Steps[bool]:
        """`;` and then another call; otherwise the position stays behind the last call."""
        back = self._at
        try:
            yield from self.spaces()
            if (yield from self.accept(";")):
                yield from self.spaces()
                if (yield from self.peek()) == "{":
                    return True
        except Ended:
            pass
        self._at = back
        return False

    def structure(self, names: Iterable[str] | None = None, required: bool = False, parallel: bool = True) -> Shape:
        made = [
            sequence(
                literal("{"),
                optional(literal('"type": "function", ')),
                tag(f'"name": "{name}", "parameters": ', json_of(self.schema(name)), "}"),
            )
            for name in self.chosen(names)
        ]
        answer = calls(made, "; ", parallel)
        if required:
            return sequence(optional(literal(TAG)), answer)
        return either([answer, triggered((TAG,), [tag(TAG, answer, "")], False, True, not_first=self.lead)])

    def tag(self, name: str) -> tuple[str, str]:
        return f'{{"name": "{name}", "parameters": ', "}"
