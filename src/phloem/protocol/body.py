"""From the bytes of a request body to a checked struct, with errors that name the field.

Rules for every route: null means unset; an unknown field is refused with its name and the nearest spelling; a field
that known clients send and that has no meaning here is read and ignored (`ignored`, with the reason); a field of a
feature that is not there yet is refused when set to anything but a harmless value (`later`).
"""

from __future__ import annotations

import difflib
import re
import types
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Generic, TypeVar, Union, get_args, get_origin, get_type_hints

import msgspec

from phloem.core.errors import BadRequest
from phloem.grammar.schema.numbers import Rounded, read_float, write_exact


@dataclass(frozen=True)
class Later:
    """A field of a feature that may not exist (`reason` says why not), and the values that ask nothing of it."""

    feature: str
    harmless: tuple[Any, ...] = ()
    reason: str = ""


class Body(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Base of request bodies. `ignored`: field -> why it is read and not used."""

    ignored: ClassVar[dict[str, str]] = {}
    later: ClassVar[dict[str, Later]] = {}
    pooled: ClassVar[bool | None] = None  # for models that do not generate, for those that do, or for both

    def refuse_later(self, features: frozenset[str], where: str = "") -> None:
        """Raise `BadRequest` for the first field that asks for what does not exist yet."""
        for name, rule in self.later.items():
            value = getattr(self, name)
            if rule.feature in features or not _asks(value, rule):
                continue
            text = f"{where}{name}: {rule.reason}" if rule.reason else f"not supported yet: {where}{name}"
            raise BadRequest(text, param=where + name, code="not_supported")


def _asks(value: Any, rule: Later) -> bool:
    """Whether a value wants anything; a list does where one of its entries does."""
    if value is None or any(value == harmless for harmless in rule.harmless):
        return False
    return any(_asks(item, rule) for item in value) if isinstance(value, list) else True


T = TypeVar("T", bound=Body)

_UNKNOWN = re.compile(r"Object contains unknown field `(?P<name>.*?)`(?: - at `\$(?P<path>.*)`)?$", re.DOTALL)
_MISSING = re.compile(r"Object missing required field `(?P<name>[^`]+)`$")
_AT = re.compile(r"^(?P<what>.*?)(?: - at `(?:key in )?\$(?P<path>.*)`)?$", re.DOTALL)
_ANY = msgspec.json.Decoder(float_hook=read_float)
MAX_ECHO = 200  # characters of a client's own text that an error repeats


class Parser(Generic[T]):
    """Decodes one kind of body."""

    def __init__(self, kind: type[T]) -> None:
        self.kind = kind
        self._decoder = msgspec.json.Decoder(kind, float_hook=read_float)
        self._top = set(kind.__struct_fields__)
        self._all = {name for struct in structs_of(kind) for name in struct.__struct_fields__}

    def parse(self, data: bytes, features: frozenset[str] = frozenset()) -> T:
        """Raises BadRequest: malformed JSON, a wrong type, an unknown field, or a feature not there yet."""
        try:
            body = self._decode(data)
        except msgspec.DecodeError as error:
            reason = "the body is empty, a JSON object is expected" if not data.strip() else str(error)
            raise BadRequest(f"malformed JSON: {reason}", code="malformed_json") from None
        except (UnicodeError, RecursionError, ValueError) as error:
            raise BadRequest(f"malformed JSON: {type(error).__name__}", code="malformed_json") from None
        body.refuse_later(features)
        return body

    def _decode(self, data: bytes) -> T:
        try:
            return self._decoder.decode(data)
        except msgspec.ValidationError as error:
            return self._with_whole_floats(data, str(error))

    def _with_whole_floats(self, data: bytes, problem: str) -> T:
        """JSON has one kind of number: some clients write 5 as 5.0. Tried only after a float was refused."""
        if "got `float`" not in problem:
            raise self._explain(problem)
        try:
            return self._decoder.decode(write_exact(_whole_floats(_ANY.decode(data))))
        except msgspec.ValidationError as error:
            raise self._explain(str(error)) from None

    def convert(self, values: dict[str, Any], features: frozenset[str] = frozenset(), *, form: bool = False) -> T:
        """The same from Python values; `form`: numbers and truth values may be text. Raises BadRequest as `parse`."""
        try:
            body = msgspec.convert(values, self.kind, strict=not form)
        except msgspec.ValidationError as error:
            raise self._explain(str(error)) from None
        except UnicodeError:
            raise BadRequest("a field holds lone surrogates: it is no valid Unicode") from None
        body.refuse_later(features)
        return body

    def _explain(self, text: str) -> BadRequest:
        unknown = _UNKNOWN.match(text)
        if unknown is not None:
            name, path = unknown["name"][:MAX_ECHO], (unknown["path"] or "").lstrip(".")
            near = difflib.get_close_matches(name, self._all if path else self._top, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            full = f"{path}.{name}" if path else name
            return BadRequest(f"unknown field {full!r}{hint}", param=full, code="unknown_field")
        found = _AT.match(text)
        what, path = (found["what"], found["path"]) if found else (text, None)
        field = (path or "").lstrip(".") or None
        missing = _MISSING.match(what)
        if missing is not None:
            what, field = "missing required field", f"{field}.{missing['name']}" if field else missing["name"]
        return BadRequest(f"{field}: {what}" if field else what, param=field, code="invalid_value")


def _whole_floats(value: Any) -> Any:
    if isinstance(value, float) and not isinstance(value, Rounded) and value.is_integer() and abs(value) < 2**63:
        return int(value)
    if isinstance(value, list):
        return [_whole_floats(item) for item in value]
    if isinstance(value, dict):
        return {key: _whole_floats(item) for key, item in value.items()}
    return value


def structs_of(kind: Any) -> list[type[msgspec.Struct]]:
    """A struct and every struct that its fields can hold."""
    found: dict[type[msgspec.Struct], None] = {}

    def visit(item: Any) -> None:
        if isinstance(item, type) and issubclass(item, msgspec.Struct):
            if item in found:
                return
            found[item] = None
            hints = get_type_hints(item, include_extras=True)
            for name in item.__struct_fields__:
                visit(hints[name])
        elif get_origin(item) in (list, dict, Union, types.UnionType, Annotated):
            for part in get_args(item):
                visit(part)

    visit(kind)
    return list(found)
