"""What a format's calls look like, in the notation of `SamplingParams.structural_tag` (see `grammar/_format.py`)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

Shape = dict[str, Any]


class Unspeakable(Exception):
    """A format cannot write calls of a tool so that they keep to its schema; the message says why."""


def literal(text: str) -> Shape:
    """Exactly this text; the names of special tokens in it mean those tokens."""
    return {"type": "const_string", "value": text}


def json_of(schema: Any) -> Shape:
    return {"type": "json_schema", "json_schema": schema}


def text(
    excludes: Iterable[str] = (), patterns: Iterable[str] = (), shortest: int = 0, longest: int | None = None
) -> Shape:
    """Free text without these; each pattern matches all of it."""
    made: Shape = {"type": "any_text", "excludes": list(excludes)}
    if shortest or longest is not None or patterns:
        made.update(patterns=list(patterns) or ["(.|\\n)*"], min_chars=shortest)
        made.update({} if longest is None else {"max_chars": longest})
    return made


def sequence(*parts: Shape) -> Shape:
    return parts[0] if len(parts) == 1 else {"type": "sequence", "elements": list(parts)}


def either(parts: Iterable[Shape]) -> Shape:
    found = list(parts)
    return found[0] if len(found) == 1 else {"type": "or", "elements": found}


def optional(part: Shape) -> Shape:
    return {"type": "optional", "content": part}


def star(part: Shape) -> Shape:
    return {"type": "star", "content": part}


def calls(names: list[Shape], separator: str, parallel: bool) -> Shape:
    """One of these calls, or several where that is allowed."""
    one = either(names)
    return {"type": "plus", "content": one, "separator": separator} if parallel else one


def members(parts: Iterable[tuple[Shape, bool]], separator: str) -> Shape:
    """Parts in order, each with whether it must be there."""
    elements = [{"content": part, "required": required} for part, required in parts]
    return {"type": "members", "elements": elements, "separator": separator}


def tag(begin: str, content: Shape, end: str) -> Shape:
    return {"type": "tag", "begin": begin, "content": content, "end": end}


def triggered(triggers: Iterable[str], tags: list[Shape], once: bool, not_first: str = "") -> Shape:
    """Free text in which a trigger goes on as one of its tags. `once`: it ends there.

    `not_first`: what free text does not begin with.
    """
    made: Shape = {"type": "triggered_tags", "triggers": list(triggers), "tags": tags}
    made.update(at_least_one=False, stop_after_first=once)
    return made | ({"not_first": not_first} if not_first else {})


def row(tags: list[Shape], parallel: bool, between: str = "") -> Shape:
    """One of these tags, or several where that is allowed, and nothing else; `between` may part them."""
    one = either(tags)
    if not parallel:
        return one
    return sequence(one, star(sequence(optional(literal(between)), one) if between else one))


def is_json(shape: Shape) -> bool:
    return shape["type"] == "json_schema"


def without(shape: Shape, markers: Iterable[str]) -> Shape:
    """A pattern that text with one of these in it does not match; other shapes as they are."""
    if shape["type"] != "regex":
        return shape
    return {"type": "any_text", "patterns": [shape["pattern"]], "excludes": list(markers)}
