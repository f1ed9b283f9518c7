"""Constraints: plain values that no engine owns."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields


@dataclass(frozen=True)
class JsonSchema:
    """Text that parses as JSON and is valid under `schema` (JSON text of a schema)."""

    schema: str


@dataclass(frozen=True)
class JsonObject:
    """Any JSON object."""


@dataclass(frozen=True)
class Regex:
    """Text that the pattern matches from its first to its last character."""

    pattern: str


@dataclass(frozen=True)
class Ebnf:
    """A context-free grammar in GBNF notation."""

    grammar: str
    root: str = "root"


@dataclass(frozen=True)
class Lark:
    """A context-free grammar in Lark notation; its root is `start`."""

    grammar: str


@dataclass(frozen=True)
class Choice:
    """Exactly one of these texts."""

    options: tuple[str, ...]


@dataclass(frozen=True)
class Literal:
    """Exactly this text, which may be empty; the names of special tokens in it mean those tokens."""

    text: str


@dataclass(frozen=True)
class Text:
    """Any text that every one of `patterns` matches as a whole and that holds none of `excludes`.

    Its length is in characters; `longest` None: without limit.
    """

    patterns: tuple[str, ...] = ()
    excludes: tuple[str, ...] = ()
    shortest: int = 0
    longest: int | None = None


@dataclass(frozen=True)
class Union:
    """Text that at least one part admits."""

    parts: tuple[Constraint, ...]


@dataclass(frozen=True)
class Sequence:
    """One part after the other."""

    parts: tuple[Constraint, ...]


@dataclass(frozen=True)
class Optional:
    """The part, or nothing."""

    part: Constraint


@dataclass(frozen=True)
class Repeat:
    """The part any number of times, `separator` between; at least once unless `empty`."""

    part: Constraint
    separator: str = ""
    empty: bool = False


@dataclass(frozen=True)
class Members:
    """Parts in this order, `separator` between those that are there; each with whether it must be."""

    parts: tuple[tuple[Constraint, bool], ...]
    separator: str


@dataclass(frozen=True)
class Tag:
    """A constrained segment between two fixed texts."""

    begin: str
    content: Constraint
    end: str


@dataclass(frozen=True)
class StructuralTag:
    """Free text; whoever writes a trigger must go on with a tag that begins with it.

    `at_least_one` asks for a tag, `stop_after_first` ends the text with the first one. `not_first` is a text that free
    text must not begin with, white space before it left aside.
    """

    triggers: tuple[str, ...]
    tags: tuple[Tag, ...]
    at_least_one: bool = False
    stop_after_first: bool = False
    not_first: str = ""


@dataclass(frozen=True)
class TagFormat:
    """A structural tag in another shape than those above: JSON text, for an engine that knows the format."""

    source: str


Constraint = (
    JsonSchema
    | JsonObject
    | Regex
    | Ebnf
    | Lark
    | Choice
    | Literal
    | Text
    | Union
    | Sequence
    | Optional
    | Repeat
    | Members
    | Tag
    | StructuralTag
    | TagFormat
)


def open_ended(constraint: Constraint) -> bool:
    """Whether only what follows can tell where this text ends."""
    match constraint:
        case Text() | Regex() | StructuralTag() | TagFormat() | Ebnf() | Lark():
            return True
        case Union(parts):
            return any(open_ended(part) for part in parts)
        case Sequence(parts):
            return open_ended(parts[-1])
        case Members(parts):
            return any(open_ended(part) for part, _ in parts)
        case Optional(part) | Repeat(part):
            return open_ended(part)
        case Tag(_, content, end):
            return not end and open_ended(content)
        case _:
            return False


def schemas_in(constraint: Constraint) -> Iterator[JsonSchema]:
    """Every JSON schema in a constraint, in order."""
    if isinstance(constraint, JsonSchema):
        yield constraint
    for field in fields(constraint):
        value = getattr(constraint, field.name)
        for item in value if isinstance(value, tuple) else (value,):
            part = item[0] if isinstance(item, tuple) else item
            if isinstance(part, Constraint):
                yield from schemas_in(part)
