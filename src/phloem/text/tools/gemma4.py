"""Gemma 4: `<|tool_call>call:f{key:<|"|>text<|"|>,n:3,deep:{a:[1]}}<tool_call|>`, keys bare and texts between marks.

Enforced values other than texts are JSON, which is read as well.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from phloem.text.shown import Shown
from phloem.text.tools._base import MAX_NAME, Malformed, partial_suffix
from phloem.text.tools._grammar import Shape, Unspeakable, either, literal, members, sequence, tag
from phloem.text.tools._json import MAX_DEPTH, JsonReader
from phloem.text.tools._parameters import listed, not_text, parameters, texts

if TYPE_CHECKING:
    from collections.abc import Iterable

    from phloem.text.tools._base import Steps
    from phloem.text.tools._json import Sink

SHOWN_BY = (Shown("<|tool_call>"),)
BEFORE = ("hermes", "granite")

BEGIN, END, QUOTE = "<|tool_call>", "<tool_call|>", '<|"|>'
_KEY = re.compile(r"[\w.$-]+")


class Parser(JsonReader):
    begins = (BEGIN,)
    trigger = BEGIN

    def section(self, marker: str) -> Steps[None]:
        yield from self.spaces()
        yield from self.skip("call:")
        name, _ = yield from self.until("{", limit=MAX_NAME)
        call = self.begin_call(name.strip())
        yield from self._fields(call.add, 0)
        call.end()
        yield from self.optional(END)

    def _fields(self, sink: Sink, depth: int) -> Steps[None]:
        """An object behind its brace."""
        if depth > MAX_DEPTH:
            raise Malformed
        sink("{")
        first = True
        while True:
            yield from self.spaces()
            if (yield from self.accept("}")):
                break
            key = yield from self._key()
            yield from self.spaces()
            sink(("" if first else ", ") + json.dumps(key, ensure_ascii=False) + ": ")
            yield from self._value(sink, depth + 1)
            first = False
            yield from self.spaces()
            if not (yield from self.accept(",")):
                yield from self.skip("}")
                break
        sink("}")

    def _key(self) -> Steps[str]:
        char = yield from self.peek()
        if char in ('"', "<"):
            pieces: list[str] = []
            yield from (self.json_string(pieces.append) if char == '"' else self._quoted(pieces.append))
            yield from self.spaces()
            yield from self.skip(":")
            return json.loads("".join(pieces))
        key, _ = yield from self.until(":", limit=MAX_NAME)
        if not _KEY.fullmatch(key.strip()):
            raise Malformed
        return key.strip()

    def _value(self, sink: Sink, depth: int) -> Steps[None]:
        char = yield from self.peek()
        if char == "{":
            self._at += 1
            yield from self._fields(sink, depth)
        elif char == "[":
            self._at += 1
            yield from self._items(sink, depth)
        elif char == "<":
            yield from self._quoted(sink)
        else:
            yield from self.json_value(sink, depth)

    def _items(self, sink: Sink, depth: int) -> Steps[None]:
        """An array behind its bracket."""
        if depth > MAX_DEPTH:
            raise Malformed
        sink("[")
        first = True
        while True:
            yield from self.spaces()
            if (yield from self.accept("]")):
                break
            if not first:
                sink(", ")
            yield from self._value(sink, depth + 1)
            first = False
            yield from self.spaces()
            if not (yield from self.accept(",")):
                yield from self.skip("]")
                break
        sink("]")

    def _quoted(self, sink: Sink) -> Steps[None]:
        """A text between marks, as a JSON string; goes on as it comes."""
        yield from self.skip(QUOTE)
        sink('"')
        while True:
            end = self._buffer.find(QUOTE, self._at)
            rest = self._buffer[self._at :] if end < 0 else self._buffer[self._at : end]
            piece = rest[: len(rest) - partial_suffix(rest, (QUOTE,))] if end < 0 else rest
            self._at += len(piece)
            sink(json.dumps(piece, ensure_ascii=False)[1:-1])
            if end >= 0:
                self._at += len(QUOTE)
                return sink('"')
            yield from self.more()

    def structure(self, names: Iterable[str] | None = None, required: bool = False, parallel: bool = True) -> Shape:
        made = [tag(f"{BEGIN}call:{name}{{", self._fields_of(name), f"}}{END}") for name in self.chosen(names)]
        return self.framed(made, required, parallel)

    def _fields_of(self, name: str) -> Shape:
        schema = self.schema(name)
        found = [(key, {}, False) for key in listed(schema)] if name in self.loose else list(parameters(schema))
        for key, _, _ in found:
            if not _KEY.fullmatch(key):
                raise Unspeakable(f"the parameter {key!r:.80} cannot be written as a key without quotes")
        parts = [(sequence(literal(f"{key}:"), self._shape(schema, spec)), must) for key, spec, must in found]
        return members(parts, ",") if parts else literal("")

    def _shape(self, schema: dict[str, Any], spec: Any) -> Shape:
        found = [tag(QUOTE, shape, QUOTE) for rule in texts(schema, spec) for shape in rule.shapes(QUOTE, False)]
        other = not_text(schema, spec)
        found += [] if other is None else [other]
        if not found:
            raise Unspeakable("a parameter admits no value")
        return either(found)
