"""Reading calls whose parameters are spelled as tags: values become JSON by the tool's schema.

A parameter that can only be a string is passed on while it is still being written.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any, ClassVar

from phloem.text.tools._base import MAX_NAME, Ended, Malformed, ToolParser, partial_suffix
from phloem.text.tools._grammar import (
    Shape,
    Unspeakable,
    calls,
    either,
    literal,
    optional,
    sequence,
    tag,
    text,
)
from phloem.text.tools._parameters import (
    admits_null,
    constants,
    dumps,
    is_open,
    kinds,
    listed,
    not_text,
    parameters,
    texts,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

    from phloem.text.tools._base import Steps, _Call

_HEADER = re.compile(
    r"""\s*name=(?:"(?P<quoted>[^"<>]+)"|(?P<bare>[^\s"<>]+))(?:\s+string="(?P<string>true|false)")?\s*"""
)
_KEY = re.compile(r"""[^<>"'\n=]+""")
_ESCAPED = re.compile(r"\\.", re.DOTALL)
_WORDS = {"True": True, "False": False, "None": None}


class XmlReader(ToolParser):
    """A tool parser whose parameters are tags.

    `newlines`: one newline at either end of a value is the format's; `pad`: what the format's models write there.
    `tells_strings`: the opening tag says whether the value is a string.
    """

    newlines: ClassVar[bool] = False
    pad: ClassVar[str] = ""
    tells_strings: ClassVar[bool] = False
    closing: ClassVar[str]  # behind a value

    def opening(self, key: str, is_string: bool, line: str) -> str:
        """What stands before a value; `line` is what parts the format's elements."""
        raise NotImplementedError

    def elements(self, name: str, line: str = "\n") -> list[Shape]:
        """The parameters of a tool, in the order of its schema, a `line` after each.

        Raises:
            Unspeakable: if one cannot be written so that it keeps to its schema.
        """
        if name in self.loose:
            return self._loose_elements(name, line)
        made: list[Shape] = []
        for key, spec, must in parameters(self.schema(name)):
            if not _is_key(key):
                raise Unspeakable(f"the name {key!r:.80} cannot stand in a tag")
            try:
                shapes = [
                    tag(self.opening(key, said, line) + self.pad, either(found), self.pad + self.closing + line)
                    for said, found in self._values(self.schema(name), spec)
                    if found
                ]
            except Unspeakable as error:
                raise Unspeakable(f"the parameter {key!r}: {error}") from None
            if shapes:
                made.append(either(shapes) if must else optional(either(shapes)))
            elif must:
                raise Unspeakable(f"the parameter {key!r} has no value that can be written")
        return made

    def _loose_elements(self, name: str, line: str) -> list[Shape]:
        """The parameters of a tool, each with any value, or not there."""
        made: list[Shape] = []
        for key in listed(self.schema(name)):
            if _is_key(key):
                said = (True, False) if self.tells_strings else (False,)
                end = self.pad + self.closing + line
                shapes = [tag(self.opening(key, is_string, line) + self.pad, text(), end) for is_string in said]
                made.append(optional(either(shapes)))
        return made

    def _values(self, root: dict[str, Any], spec: Any) -> list[tuple[bool, list[Shape]]]:
        """How values of a schema are written so that the parser reads them back: (whether told as strings, shapes)."""
        found, trims = kinds(root, spec), self.newlines and not self.pad
        strings: list[Shape] = []
        if "string" in found or (self.tells_strings and not found):
            strings = [shape for rule in texts(root, spec) for shape in rule.shapes(self.closing, trims)]
        if self.tells_strings:
            other = not_text(root, spec)
            return [(True, strings), (False, [other] if other is not None else [])]
        if "string" in found:  # then all but null is read as a text
            return [(True, [*strings, *([literal("null")] if "null" in found and admits_null(root, spec) else [])])]
        fixed = constants(root, spec)
        if not found and fixed is not None:
            return [(False, [literal(item) for item in self._spelled(fixed)])]
        if not found and is_open(root, spec):
            return [(False, [text([self.closing])])]
        other = not_text(root, spec)
        return [(False, [other] if other is not None else [])]

    def _spelled(self, values: list[Any]) -> list[str]:
        """Values of no single type: those that are read back as they are written."""
        written = [(item if isinstance(item, str) else dumps(item), item) for item in values]
        read = [(item, value, convert(item, set(), None)) for item, value in written if self.closing not in item]
        return [item for item, value, back in read if dumps(back) == dumps(value)]

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
        value = yield from self._value(end, "string" not in kinds)
        if self.newlines:
            value = value.removeprefix("\n").removesuffix("\n")
        call.add(head + _written(convert(value, kinds, is_string), value))
        self._first = False

    def _value(self, end: str, may_be_json: bool) -> Steps[str]:
        """A value up to `end`, where that does not stand inside a string of JSON."""
        first, _ = yield from self.until(end)
        inside = _open_string(first)
        if not may_be_json or first.lstrip()[:1] not in ("{", "[") or not inside:
            return first
        pieces, back = [first], self._at
        try:
            while inside and self._at - back < 1 << 20:
                more, _ = yield from self.until(end)
                pieces.append(more)
                inside ^= _open_string(more)
            json.loads(end.join(pieces))
        except (Ended, ValueError, RecursionError):
            self._at = back
            return first
        return end.join(pieces)

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


def _is_key(key: str) -> bool:
    return _KEY.fullmatch(key) is not None and len(key) <= MAX_NAME and key.strip() == key


def _open_string(text: str) -> bool:
    """Whether a piece of JSON ends inside a string, if it does not begin in one."""
    return _ESCAPED.sub("", text).count('"') % 2 == 1


def _written(value: Any, source: str) -> str:
    """A value as JSON; a number beyond what a float holds stays as it was written."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except ValueError:
        return source.strip()


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

    sections = True
    prefix: ClassVar[str] = ""
    frame: ClassVar[tuple[str, str]] = ("", "")  # around all calls of a section

    def opening(self, key: str, is_string: bool, line: str) -> str:
        told = f' string="{str(is_string).lower()}"' if self.tells_strings else ""
        return f'<{self.prefix}parameter name="{key}"{told}>'

    def invocation(self, name: str) -> Shape:
        """One call."""
        begin, end = literal(f'<{self.prefix}invoke name="{name}">\n'), literal(f"</{self.prefix}invoke>")
        return sequence(begin, *self.elements(name), end)

    def structure(self, names: Iterable[str] | None = None, required: bool = False, parallel: bool = True) -> Shape:
        made = calls([self.invocation(name) for name in self.chosen(names)], "\n", parallel)
        begin, end = self.frame
        return self.framed([tag(f"{begin}\n", made, f"\n{end}")], required, parallel)

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
