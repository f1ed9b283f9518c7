"""Reading JSON from a text that is still arriving: every piece goes on at once, and the first wrong character is found.

Two slips of models are mended: raw control characters inside strings are escaped, and so is a backslash that begins no
escape. Python's True, False and None are taken for JSON's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar

from phloem.text.tools._base import Ended, Malformed, ToolParser

if TYPE_CHECKING:
    from phloem.text.tools._base import Steps, _Call

MAX_DEPTH = 64
Sink = Callable[[str], None]

_RUN = re.compile(r'[^"\\\x00-\x1f]+')
_BARE = re.compile(r"[-+.\w]+")
_NUMBER = re.compile(r"-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][-+]?\d+)?", re.ASCII)
_WORDS = {"true": "true", "false": "false", "null": "null", "True": "true", "False": "false", "None": "null"}
_ESCAPES = frozenset('"\\/bfnrt')
# Keys that stand beside the name and the arguments and say nothing more.
_BESIDE = frozenset({"id", "type", "index", "call_id", "tool_call_id"})
ARGUMENT_KEYS = frozenset({"arguments", "parameters"})


def discard(text: str) -> None:
    """A sink for what is not kept."""


class JsonReader(ToolParser):
    """A tool parser whose arguments are JSON."""

    name_key: ClassVar[str] = "name"

    def json_value(self, sink: Sink, depth: int = 0) -> Steps[None]:
        """One value, given to `sink` piece by piece."""
        if depth > MAX_DEPTH:
            raise Malformed
        char = yield from self.peek()
        if char == "{":
            yield from self._object(sink, depth)
        elif char == "[":
            yield from self._array(sink, depth)
        elif char == '"':
            yield from self.json_string(sink)
        else:
            yield from self._bare(sink)

    def json_string(self, sink: Sink) -> Steps[None]:
        yield from self.skip('"')
        sink('"')
        while True:
            yield from self.peek()
            run = _RUN.match(self._buffer, self._at)
            if run is not None:
                self._at = run.end()
                sink(run.group())
                continue
            char = self._buffer[self._at]
            if char == '"':
                self._at += 1
                sink('"')
                return
            if char == "\\":
                yield from self._escape(sink)
            else:
                self._at += 1
                sink(json.dumps(char)[1:-1])

    def _escape(self, sink: Sink) -> Steps[None]:
        while self._at + 1 >= len(self._buffer):
            yield from self.more()
        kind = self._buffer[self._at + 1]
        if kind == "u":
            while self._at + 6 > len(self._buffer):
                yield from self.more()
            digits = self._buffer[self._at + 2 : self._at + 6]
            if not re.fullmatch("[0-9a-fA-F]{4}", digits):
                raise Malformed
            self._at += 6
            sink("\\u" + digits)
        elif kind in _ESCAPES:
            self._at += 2
            sink("\\" + kind)
        else:
            self._at += 1
            sink("\\\\")

    def _bare(self, sink: Sink) -> Steps[None]:
        start = self._at
        while True:
            found = _BARE.match(self._buffer, start)
            if found is None or found.end() - start > 400:
                raise Malformed
            if found.end() < len(self._buffer):
                break
            yield from self.more()
        word = _WORDS.get(found.group())
        if word is None and _NUMBER.fullmatch(found.group()) is None:
            raise Malformed
        self._at = found.end()
        sink(word or found.group())

    def _object(self, sink: Sink, depth: int) -> Steps[None]:
        yield from self._next("{", sink)
        if (yield from self.peek()) == "}":
            self._at += 1
            return sink("}")
        while True:
            yield from self.json_string(sink)
            yield from self._padding(sink)
            yield from self._next(":", sink)
            yield from self.json_value(sink, depth + 1)
            if not (yield from self._goes_on("}", sink)):
                return None

    def _array(self, sink: Sink, depth: int) -> Steps[None]:
        yield from self._next("[", sink)
        if (yield from self.peek()) == "]":
            self._at += 1
            return sink("]")
        while True:
            yield from self.json_value(sink, depth + 1)
            if not (yield from self._goes_on("]", sink)):
                return None

    def _next(self, char: str, sink: Sink) -> Steps[None]:
        yield from self.skip(char)
        sink(char)
        yield from self._padding(sink)

    def _padding(self, sink: Sink) -> Steps[None]:
        space = yield from self.spaces()
        if space:
            sink(space)

    def _goes_on(self, close: str, sink: Sink) -> Steps[bool]:
        yield from self._padding(sink)
        char = yield from self.peek()
        if char == close:
            self._at += 1
            sink(close)
            return False
        yield from self._next(",", sink)
        return True

    # Calls

    def arguments(self, call: _Call) -> Steps[None]:
        """A JSON object as a call's arguments, streamed. The call is not ended."""
        if (yield from self.peek()) != "{":
            raise Malformed
        yield from self._object(call.add, 0)

    def text_of_string(self) -> Steps[str]:
        pieces: list[str] = []
        yield from self.json_string(pieces.append)
        return json.loads("".join(pieces))

    def named_objects(self) -> Steps[None]:
        """An array of calls, each as `named_object` reads it."""
        yield from self.skip("[")
        while True:
            yield from self.spaces()
            yield from self.named_object()
            if not (yield from self.optional(",")):
                break
        yield from self.optional("]")

    def named_object(self, call_id: str | None = None) -> Steps[None]:
        """`{"name": ..., "arguments": {...}}` in either order; ends the call."""
        yield from self.skip("{")
        name = ""
        call: _Call | None = None
        early = ""  # arguments that came before the name
        while True:
            yield from self.spaces()
            key = yield from self.text_of_string()
            yield from self.spaces()
            yield from self.skip(":")
            yield from self.spaces()
            if key == self.name_key and not name:
                name = yield from self.text_of_string()
                call = self.begin_call(name, call_id)
                if early:
                    call.add(early)
            elif key in ARGUMENT_KEYS and not early:
                early = yield from self._value_of_arguments(call)
            elif key in _BESIDE:
                yield from self.json_value(discard)
            else:
                raise Malformed
            yield from self.spaces()
            if (yield from self.accept("}")):
                break
            yield from self.skip(",")
        if call is None:
            raise Malformed
        if not early:
            call.add("{}")
        call.end()

    def _value_of_arguments(self, call: _Call | None) -> Steps[str]:
        """An object, streamed if the call is known by now; null; or an object as text inside a string."""
        char = yield from self.peek()
        if char == "{":
            if call is not None:
                yield from self.arguments(call)
                return "{"
            pieces: list[str] = []
            yield from self._object(pieces.append, 0)
            return "".join(pieces)
        if char == '"':
            text = yield from self.text_of_string()
            try:
                whole = json.loads(text or "{}")
            except (ValueError, RecursionError):
                raise Malformed from None
            if not isinstance(whole, dict):
                raise Malformed
            text = text or "{}"
        else:
            yield from self.skip("null")
            text = "{}"
        if call is not None:
            call.add(text)
        return text


class MarkedReader(JsonReader):
    """Each call is one object of a name and its arguments, between two marks."""

    end: ClassVar[str]

    def section(self, marker: str) -> Steps[None]:
        yield from self.spaces()
        yield from self.named_object()
        yield from self.optional(self.end)

    def tag(self, name: str) -> tuple[str, str]:
        return f'{self.trigger}\n{{"name": "{name}", "arguments": ', f"}}\n{self.end}"


__all__ = ["ARGUMENT_KEYS", "MAX_DEPTH", "Ended", "JsonReader", "MarkedReader", "discard"]
