"""Llama 3.1 to 3.3: `{"name": ..., "parameters": {...}}` as the whole answer, several joined by `;`.

A `<|python_tag|>` may stand before it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from phloem.text.shown import Shown
from phloem.text.tools._base import Ended
from phloem.text.tools._grammar import (
    Shape,
    calls,
    either,
    is_json,
    json_of,
    literal,
    optional,
    sequence,
    tag,
    triggered,
    without,
)
from phloem.text.tools._json import JsonReader
from phloem.text.tools.json_array import one_call

if TYPE_CHECKING:
    from collections.abc import Iterable

    from phloem.text.tools._base import Steps

NAMES = ("llama", "llama3_json", "llama32", "llama4_json")
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
        answer = calls([self._call_of(name) for name in self.chosen(names)], "; ", parallel)
        if required:
            return sequence(optional(literal(TAG)), answer)
        return either([answer, triggered((TAG,), [tag(TAG, answer, "")], True, not_first=self.lead)])

    def instead(self, answer: Shape, names: Iterable[str] | None = None, parallel: bool = True) -> Shape:
        """Where the answer is JSON, calls are told from it in the words of JSON; else by the marker before them."""
        chosen = self.chosen(names)
        marked = tag(TAG, calls([self._call_of(name) for name in chosen], "; ", parallel), "")
        if not is_json(answer):
            return either([marked, without(answer, self.begins)])
        schemas = [one_call(name, self.bound(name)) for name in chosen]
        return either([marked, calls([json_of(schema) for schema in schemas], "; ", parallel), answer])

    def _call_of(self, name: str) -> Shape:
        return sequence(
            literal("{"),
            optional(literal('"type": "function", ')),
            tag(f'"name": "{name}", "parameters": ', self.written(name), "}"),
        )

    def tag(self, name: str) -> tuple[str, str]:
        return f'{{"name": "{name}", "parameters": ', "}"
