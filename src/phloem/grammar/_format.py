"""Reading constraints that are written as text: patterns, grammars, structural tags.

Structural tags come in two spellings, `{"structures": [...], "triggers": [...]}` and `{"type": "structural_tag",
"format": {...}}`. The second is xgrammar's notation. What is read here, `_nodes` describes; some things are added to
the notation: `separator` of `plus` and `star`, `not_first` of `triggered_tags`, the shapes `members` and `ebnf`, a
schema as its text, and `any_text` may bring `patterns`, `min_chars` and `max_chars`. A tag with another shape in it is
left as a whole to an engine that reads the notation itself.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from phloem.core.errors import BadRequest
from phloem.grammar import _nodes
from phloem.grammar.schema.names import read_json, write_json

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from phloem.grammar._nodes import Constraint

MAX_REPETITION = 10_000  # `a{100000}` forces 100 kB of text and costs 0.1 s a mask
MAX_CHOICES = 10_000
MAX_NESTING = 32


class _Foreign(Exception):
    """A shape that only an engine that reads the notation itself knows."""


def check_regex(pattern: str) -> _nodes.Regex:
    """Refuse what no engine may be asked: huge repetition counts. The syntax is the engine's to judge."""
    _check_counts(pattern)
    return _nodes.Regex(pattern)


def _check_counts(text: str) -> None:
    for match in re.finditer(r"\{(\d*)(?:,(\d*))?\}", text):
        if any(bound and int(bound[:12]) > MAX_REPETITION for bound in match.groups()):
            raise BadRequest(f"the repetition {match.group()} is above {MAX_REPETITION}")


def read_ebnf(text: str) -> Constraint:
    """A grammar in GBNF or Lark notation."""
    _check_counts(text)
    if "::=" not in text and re.search(r"^\??start\b[^:\n]*:", text, re.MULTILINE):
        return _nodes.Lark(text)
    return _nodes.Ebnf(text)


def choice(options: Sequence[str]) -> _nodes.Choice:
    """One of these texts.

    Raises:
        BadRequest: too many, none at all, or an empty one.
    """
    if not options or any(not option for option in options):
        raise BadRequest("a choice needs at least one text, none of them empty")
    if len(options) > MAX_CHOICES:
        raise BadRequest(f"{len(options)} choices; at most {MAX_CHOICES}")
    return _nodes.Choice(tuple(dict.fromkeys(options)))


def read_structural_tag(text: str) -> Constraint:
    """
    Raises:
        BadRequest: with the place in the tag.
    """
    body = read_json(text)
    if not isinstance(body, dict):
        raise BadRequest("expected a JSON object")
    if "structures" in body:
        tags = [_legacy_tag(item, f"#/structures/{i}") for i, item in enumerate(_list(body, "structures", "#"))]
        return _triggered(tags, body, "#")
    shape = body.get("format")
    if not isinstance(shape, dict):
        raise BadRequest("#: expected `format`, or `structures` and `triggers`")
    try:
        return _read(shape, "#/format", 0)
    except _Foreign:
        return _nodes.TagFormat(json.dumps({"type": "structural_tag", "format": shape}, ensure_ascii=False))


def _read(shape: Any, path: str, depth: int) -> Constraint:
    if depth > MAX_NESTING:
        raise BadRequest(f"{path}: nested deeper than {MAX_NESTING} levels")
    if not isinstance(shape, dict):
        raise BadRequest(f"{path}: expected an object")
    kind = shape.get("type")
    reader = _SHAPES.get(kind) if isinstance(kind, str) else None
    if reader is None:
        raise _Foreign
    return reader(shape, path, depth)


def _only(shape: dict[str, Any], *names: str) -> None:
    """Fields that are not known here may change the meaning."""
    unset = [name for name, value in shape.items() if value is None or value is False or value == []]
    if any(name not in ("type", *unset, *names) for name in shape):
        raise _Foreign


def _fixed(shape: dict[str, Any], path: str, depth: int) -> Constraint:
    _only(shape, "value")
    if not isinstance(shape.get("value"), str):
        raise BadRequest(f"{path}/value: expected a text")
    return _nodes.Literal(shape["value"])


def _schema(shape: dict[str, Any], path: str, depth: int) -> Constraint:
    if shape.get("style", "json") != "json":
        raise _Foreign
    _only(shape, "json_schema", "style")
    schema = shape.get("json_schema", {})
    return _nodes.JsonSchema(schema if isinstance(schema, str) else write_json(schema, f"{path}/json_schema"))


def _regex(shape: dict[str, Any], path: str, depth: int) -> Constraint:
    _only(shape, "pattern")
    if not isinstance(shape.get("pattern"), str):
        raise BadRequest(f"{path}/pattern: expected a text")
    return check_regex(shape["pattern"])


def _ebnf(shape: dict[str, Any], path: str, depth: int) -> Constraint:
    _only(shape, "grammar")
    if not isinstance(shape.get("grammar"), str):
        raise BadRequest(f"{path}/grammar: expected a text")
    return read_ebnf(shape["grammar"])


def _text(shape: dict[str, Any], path: str, depth: int) -> Constraint:
    _only(shape, "excludes", "patterns", "min_chars", "max_chars")
    if "max_chars" in shape and shape.get("patterns") is None:
        raise _Foreign  # a plain `any_text` with a limit is the notation's own
    excludes, patterns = (_texts(shape, name, path) for name in ("excludes", "patterns"))
    for pattern in patterns:
        _check_counts(pattern)
    low, high = shape.get("min_chars") or 0, shape.get("max_chars")
    if not isinstance(low, int) or not isinstance(high, int | None) or not 0 <= low <= MAX_REPETITION:
        raise BadRequest(f"{path}/min_chars: expected a number of at most {MAX_REPETITION}")
    return _nodes.Text(patterns, excludes, low, high)


def _texts(shape: dict[str, Any], name: str, path: str) -> tuple[str, ...]:
    found: Any = shape.get(name) or []
    if not isinstance(found, list) or not all(isinstance(item, str) and item for item in found):
        raise BadRequest(f"{path}/{name}: expected a list of texts")
    return tuple(found)


def _parts(shape: dict[str, Any], path: str, depth: int) -> tuple[Constraint, ...]:
    _only(shape, "elements")
    items = _list(shape, "elements", path)
    if not items:
        raise BadRequest(f"{path}/elements: expected at least one")
    return tuple(_read(item, f"{path}/elements/{i}", depth + 1) for i, item in enumerate(items))


def _repeated(shape: dict[str, Any], path: str, depth: int) -> Constraint:
    _only(shape, "content", "separator")
    separator = shape.get("separator") or ""
    if not isinstance(separator, str):
        raise BadRequest(f"{path}/separator: expected a text")
    part = _read(shape.get("content"), f"{path}/content", depth + 1)
    return _nodes.Repeat(part, separator, empty=shape["type"] == "star")


def _maybe(shape: dict[str, Any], path: str, depth: int) -> Constraint:
    _only(shape, "content")
    return _nodes.Optional(_read(shape.get("content"), f"{path}/content", depth + 1))


def _members(shape: dict[str, Any], path: str, depth: int) -> Constraint:
    parts: list[tuple[Constraint, bool]] = []
    for index, item in enumerate(_list(shape, "elements", path)):
        where = f"{path}/elements/{index}"
        if not isinstance(item, dict) or not isinstance(item.get("required"), bool):
            raise BadRequest(f"{where}: expected `content` and `required`")
        parts.append((_read(item.get("content"), f"{where}/content", depth + 1), item["required"]))
    if not isinstance(shape.get("separator"), str):
        raise BadRequest(f"{path}/separator: expected a text")
    return _nodes.Members(tuple(parts), shape["separator"])


def _tag(shape: dict[str, Any], path: str, depth: int) -> _nodes.Tag:
    if not isinstance(shape.get("content"), dict):
        raise BadRequest(f"{path}: expected `begin`, `content` and `end`")
    begin, end = shape.get("begin"), shape.get("end", "")
    if not isinstance(begin, str) or not isinstance(end, str):
        raise _Foreign
    return _nodes.Tag(begin, _read(shape["content"], f"{path}/content", depth + 1), end)


def _triggered_tags(shape: dict[str, Any], path: str, depth: int) -> Constraint:
    _only(shape, "triggers", "tags", "at_least_one", "stop_after_first", "not_first")
    tags: list[_nodes.Tag] = []
    for index, item in enumerate(_list(shape, "tags", path)):
        if not isinstance(item, dict):
            raise BadRequest(f"{path}/tags/{index}: expected `begin`, `content` and `end`")
        tags.append(_tag(item, f"{path}/tags/{index}", depth + 1))
    return _triggered(tags, shape, path)


def _triggered(tags: list[_nodes.Tag], body: dict[str, Any], path: str) -> _nodes.StructuralTag:
    triggers = tuple(_list(body, "triggers", path))
    if not all(isinstance(trigger, str) and trigger for trigger in triggers):
        raise BadRequest(f"{path}/triggers: expected non-empty texts")
    if not tags:
        raise BadRequest(f"{path}: no tags")
    for index, tag in enumerate(tags):
        if not any(tag.begin.startswith(trigger) for trigger in triggers):
            raise BadRequest(f"{path}: no trigger is a beginning of tag {index}, {tag.begin!r}")
    not_first = body.get("not_first") or ""
    if not isinstance(not_first, str):
        raise BadRequest(f"{path}/not_first: expected a text")
    must, once = bool(body.get("at_least_one", False)), bool(body.get("stop_after_first", False))
    return _nodes.StructuralTag(triggers, tuple(tags), must, once, not_first)


def _list(body: dict[str, Any], name: str, path: str) -> list[Any]:
    value = body.get(name)
    if not isinstance(value, list):
        raise BadRequest(f"{path}/{name}: expected a list")
    return value


def _legacy_tag(item: Any, path: str) -> _nodes.Tag:
    if not isinstance(item, dict) or not isinstance(item.get("begin"), str) or not isinstance(item.get("end"), str):
        raise BadRequest(f"{path}: expected `begin`, `schema` and `end`")
    schema = item.get("schema", {})
    text = schema if isinstance(schema, str) else write_json(schema, f"{path}/schema")
    return _nodes.Tag(item["begin"], _nodes.JsonSchema(text), item["end"])


_SHAPES: dict[str, Callable[[dict[str, Any], str, int], Constraint]] = {
    "const_string": _fixed,
    "json_schema": _schema,
    "regex": _regex,
    "ebnf": _ebnf,
    "any_text": _text,
    "sequence": lambda shape, path, depth: _nodes.Sequence(_parts(shape, path, depth)),
    "or": lambda shape, path, depth: _nodes.Union(_parts(shape, path, depth)),
    "optional": _maybe,
    "plus": _repeated,
    "star": _repeated,
    "members": _members,
    "tag": _tag,
    "triggered_tags": _triggered_tags,
}
