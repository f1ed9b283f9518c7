"""Pythonic calls (Llama 3.2 and 4, and others): `[f(a=1, b="x"), g()]`, the arguments Python literals.

It is the whole answer, or stands between `<|python_start|>` and `<|python_end|>`.
"""

from __future__ import annotations

import ast
import json
import keyword
import re
import sys
from typing import TYPE_CHECKING, Any, ClassVar

from phloem.text.shown import Shown
from phloem.text.tools._base import MAX_NAME, Ended, Malformed
from phloem.text.tools._grammar import (
    Shape,
    Unspeakable,
    calls,
    either,
    is_json,
    literal,
    members,
    sequence,
    tag,
    triggered,
    without,
)
from phloem.text.tools._json import JsonReader
from phloem.text.tools._parameters import as_json, listed, parameters

if TYPE_CHECKING:
    from collections.abc import Iterable

    from phloem.text.tools._base import Steps

NAMES = ("llama4", "llama4_pythonic")
SHOWN_BY = (Shown("[func_name1(params_name1=params_value1"),)
BEFORE = ("llama3",)

BEGIN, END = "<|python_start|>", "<|python_end|>"
MAX_LENGTH = 64 * 1024
_HEAD = re.compile(r"\[\s*[A-Za-z_][\w.]*\s*\(")
_HEAD_PART = re.compile(r"\[\s*(?:[A-Za-z_][\w.]*\s*\(?)?")
_STRING = re.compile(r"""'(?:[^'\\\n]|\\.)*'|"(?:[^"\\\n]|\\.)*\"""", re.DOTALL)


class Parser(JsonReader):
    begins = (BEGIN,)
    end: ClassVar[str] = END
    lead = "["

    def section(self, marker: str) -> Steps[None]:
        yield from self.spaces()
        if self.place == "forced":
            yield from self._with_json()
        else:
            yield from self._list()
        if marker:
            yield from self.optional(self.end)

    def _list(self) -> Steps[None]:
        start = self._at
        try:
            text = yield from self._brackets()
        except Ended:
            if self._cut:
                self._begun(self._buffer[start:])
            raise
        for name, arguments in _read(text):
            call = self.begin_call(name)
            call.add(arguments)
            call.end()

    def _begun(self, text: str) -> None:
        """What there is of a list that was cut: its calls, of the last one the arguments that are whole."""
        whole, inside = _up_to_cut(text)
        found = _read(whole)
        for number, (name, arguments) in enumerate(found):
            call = self.begin_call(name)
            partial = inside and number == len(found) - 1
            call.add(arguments.removesuffix("}").removesuffix("{") if partial else arguments)
            if not partial:
                call.end()

    def _with_json(self) -> Steps[None]:
        """Calls as a grammar has them written: their values are JSON, and go on as they come."""
        yield from self.skip("[")
        while True:
            yield from self.with_json()
            if not (yield from self.optional(",")):
                break
            yield from self.spaces()
        yield from self.optional("]")

    def with_json(self) -> Steps[None]:
        """One call whose values are JSON."""
        name, _ = yield from self.until("(", limit=MAX_NAME)
        call = self.begin_call(name.strip())
        first = True
        while not (yield from self.accept(")")):
            if not first:
                yield from self.skip(",")
            key, _ = yield from self.until("=", limit=MAX_NAME)
            call.add(("{" if first else ", ") + json.dumps(key.strip(), ensure_ascii=False) + ": ")
            yield from self.json_value(call.add)
            yield from self.spaces()
            first = False
        call.add("{}" if first else "}")
        call.end()

    def structure(self, names: Iterable[str] | None = None, required: bool = False, parallel: bool = True) -> Shape:
        answer = sequence(
            literal("["), calls([self.one_call(name) for name in self.chosen(names)], ", ", parallel), literal("]")
        )
        framed = tag(BEGIN, answer, END)
        if required:
            return either([answer, framed])
        return either([answer, triggered((BEGIN,), [framed], True, not_first=self.lead)])

    def instead(self, answer: Shape, names: Iterable[str] | None = None, parallel: bool = True) -> Shape:
        """An answer in another form than JSON could begin as calls do: they have their markers then."""
        calls_of = self.structure(names, True, parallel)
        return either([calls_of if is_json(answer) else calls_of["elements"][1], without(answer, self.begins)])

    def one_call(self, name: str) -> Shape:
        """One call; its arguments are JSON, which the reader of Python's literals understands."""
        if not all(_is_name(part) for part in name.split(".")):
            raise Unspeakable(f"{name!r:.80} is no name in Python")
        schema = self.schema(name)
        found: list[tuple[Shape, bool]] = []
        for key, spec, must in self._parameters(name):
            if not _is_name(key):
                raise Unspeakable(f"the parameter {key!r:.80} is no name in Python")
            found.append((sequence(literal(f"{key}="), as_json(schema, spec)), must))
        inside = [members(found, ", ")] if found else []
        return sequence(literal(f"{name}("), *inside, literal(")"))

    def _parameters(self, name: str) -> Iterable[tuple[str, Any, bool]]:
        schema = self.schema(name)
        if name not in self.loose:
            return parameters(schema)
        return [(key, {}, False) for key in listed(schema) if _is_name(key)]

    def _brackets(self) -> Steps[str]:
        """From `[name(` to the bracket that closes it."""
        start = self._at
        while (head := _HEAD.match(self._buffer, start)) is None:
            part = _HEAD_PART.fullmatch(self._buffer, start)
            if part is None or len(part.group()) > 300:
                raise Malformed
            yield from self.more()
        name = head.group()[1:-1].strip()
        if self.tools and name not in self.tools:
            raise Malformed
        depth = 0
        while True:
            if self._at - start > MAX_LENGTH:
                raise Malformed
            char = yield from self.peek()
            if char in "'\"":
                yield from self._string()
                continue
            self._at += 1
            depth += (char in "([{") - (char in ")]}")
            if depth == 0:
                return self._buffer[start : self._at]

    def _string(self) -> Steps[None]:
        start = self._at
        while (found := _STRING.match(self._buffer, start)) is None:
            if len(self._buffer) - start > MAX_LENGTH or "\n" in self._buffer[start:].split("\\\n")[0]:
                raise Malformed
            yield from self.more()
        self._at = found.end()


def _up_to_cut(text: str) -> tuple[str, bool]:
    """A list of calls that was cut, closed behind what is whole of it; whether that is inside a call."""
    whole, depth, at = "[", 0, 0
    inside = False
    while at < len(text):
        string = _STRING.match(text, at)
        if string is None and text[at] in "'\"":
            break
        char = text[at]
        at = at + 1 if string is None else string.end()
        depth += (string is None) * ((char in "([{") - (char in ")]}"))
        if char == "(" and depth == 2:
            whole, inside = text[:at], True
        elif char == "," and depth == 2:
            whole = text[: at - 1]
        elif char == ")" and depth == 1:
            whole, inside = text[:at], False
    return whole + (")]" if inside else "]"), inside


def _is_name(text: str) -> bool:
    return text.isascii() and text.isidentifier() and not keyword.iskeyword(text)


def _read(text: str) -> list[tuple[str, str]]:
    """Names and arguments of the calls in a list."""
    try:
        tree = ast.parse(text, mode="eval")
        if not isinstance(tree.body, ast.List) or not tree.body.elts:
            raise Malformed
        return [_call(item) for item in tree.body.elts]
    except (SyntaxError, ValueError, MemoryError, RecursionError, TypeError):
        raise Malformed from None


def _call(item: ast.expr) -> tuple[str, str]:
    if not isinstance(item, ast.Call) or item.args:
        raise Malformed
    arguments: dict[str, Any] = {}
    for given in item.keywords:
        if given.arg is None:
            raise Malformed
        arguments[given.arg] = _value(given.value)
    return ast.unparse(item.func), json.dumps(arguments, ensure_ascii=False, allow_nan=False)


def _value(node: ast.expr) -> Any:
    """A Python literal, in which JSON's true, false and null are understood too."""
    match node:
        case ast.Constant(value=float() as value):
            return min(value, sys.float_info.max)  # JSON has no infinity
        case ast.Constant(value=str() | int() | None as value):
            return value
        case ast.Name(id="true" | "false" | "null" as word):
            return json.loads(word)
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float()) as number):
            return -_value(number)
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return [_value(item) for item in items]
        case ast.Dict(keys=keys, values=values):
            return {_key(key): _value(value) for key, value in zip(keys, values, strict=True)}
        case _:
            raise Malformed


def _key(node: ast.expr | None) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str | int | float):
        return str(node.value)
    raise Malformed


__all__ = ["Ended", "Parser"]
