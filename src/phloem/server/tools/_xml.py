"""Reading calls whose parameters are spelled as tags: values become JSON by the tool's schema.

A parameter that can only be a string is passed on while it is still being written.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any, ClassVar

from phloem.server.tools._base import MAX_NAME, Malformed, ToolParser, partial_suffix

if TYPE_CHECKING:
    from phloem.server.tools._base import Steps, _Call

_HEADER = re.compile(
    r"""\s*name=(?:"(?P<quoted>[^"<>]+)"|(?P<bare>[^\s"<>]+))(?:\s+string="(?P<string>true|false)")?\s*"""
)
_WORDS = {"True": True, "False": False, "None": None}


class XmlReader(ToolParser):
    """A tool parser whose parameters are tags. `newlines`: one newline at either end of a value is the format's."""

    newlines: ClassVar[bool] = False

    def begin(self, name: str) -> _Call:
        self._first = True
        return self.begin_call(name)

    def complete(self, call: _Call) -> None:
        call.add("{}" if self._first else "}")
        call.end()

    def parameter(self, call: _Call, key: str, end: str, is_string: bool | None = None) -> Steps[None]:
        """A value up to `end`. `is_string` is what the format itself says of its type."""
        kinds = self.kinds(call.name, key)
        head = ("{" if self._first else ", ") + json.dumps(key, ensure_ascii=False) + ": "
        if is_string or (is_string is None and kinds == {"string"}):
            call.add(head + '"')
            self._first = False
            yield from self._string(call, end)
            call.add('"')
            return
        value, _ = yield from self.until(end)
        if self.newlines:
            value = value.removeprefix("\n").removesuffix("\n")
        call.add(head + json.dumps(convert(value, kinds, is_string), ensure_ascii=False))
        self._first = False

    def _string(self, call: _Call, end: str) -> Steps[None]:
        if self.newlines:
            yield from self.accept("\n")
        tail = "\n" + end if self.newlines else end
        while True:
            at = self._buffer.find(end, self._at)
            stop = at if at >= 0 else len(self._buffer) - partial_suffix(self._buffer[self._at :], (tail, end))
            text = self._buffer[self._at : stop]
            if at >= 0:
                self._at = at + len(end)
                call.add(escaped(text.removesuffix("\n") if self.newlines else text))
                return
            self._at = stop
            call.add(escaped(text))
            yield from self.more()


def escaped(text: str) -> str:
    """A text as the inside of a JSON string."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


def convert(text: str, kinds: set[str], is_string: bool | None) -> Any:
    """A parameter's text as a value of one of these JSON types; the text itself where it is none."""
    bare = text.strip()
    if "string" in kinds and is_string is None:
        return None if bare == "null" and "null" in kinds else text
    if bare in _WORDS:
        return _WORDS[bare]
    try:
        value = json.loads(bare, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return text
    if isinstance(value, float) and kinds == {"integer"} and value.is_integer():
        return int(value)
    return text if not kinds and is_string is None and isinstance(value, str) else value


def _refuse(text: str) -> Any:
    raise ValueError(text)


class InvokeReader(XmlReader):
    """`<PREFIXinvoke name="f"><PREFIXparameter name="k">v</PREFIXparameter></PREFIXinvoke>`."""

    prefix: ClassVar[str] = ""

    def header(self) -> Steps[tuple[str, bool | None]]:
        """The rest of an opening tag: its name, and what it says of the value being a string."""
        text, _ = yield from self.until(">", limit=2 * MAX_NAME)
        found = _HEADER.fullmatch(text)
        if found is None:
            raise Malformed
        string = found["string"]
        return found["quoted"] or found["bare"], None if string is None else string == "true"

    def invoke(self) -> Steps[None]:
        """What follows `<PREFIXinvoke`."""
        name, _ = yield from self.header()
        call = self.begin(name)
        while True:
            yield from self.spaces()
            if (yield from self.accept(f"</{self.prefix}invoke>")):
                return self.complete(call)
            yield from self.skip(f"<{self.prefix}parameter")
            key, is_string = yield from self.header()
            yield from self.parameter(call, key, f"</{self.prefix}parameter>", is_string)

    def invokes(self, end: str) -> Steps[None]:
        """One call or more, and the section's end."""
        yield from self.spaces()
        yield from self.skip(f"<{self.prefix}invoke")
        while True:
            yield from self.invoke()
            if not (yield from self.optional(f"<{self.prefix}invoke")):
                break
        yield from self.optional(end)
