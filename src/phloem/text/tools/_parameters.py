"""A tool's parameters as formats without a JSON frame write them: text as it is, everything else as JSON.

A grammar made from this admits only what the format's parser reads back as a valid value. Where a schema cannot be
followed so, `Unspeakable` says why.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from phloem.core.errors import BadRequest
from phloem.grammar.schema import names as _schema
from phloem.grammar.schema.formats import PATTERNS
from phloem.text.tools._grammar import Shape, Unspeakable, json_of, literal, text

MAX_FOLLOWED = 8  # references, one behind the other
MAX_BRANCHES = 64
MAX_SHORTEST = 10_000
_DEFINITIONS = ("$defs", "definitions")
_NOT_TEXT = ("object", "array", "number", "boolean", "null")
# What a text's schema may say; other keywords that constrain texts are refused.
_TEXT_KEYS = frozenset({"type", "enum", "const", "pattern", "minLength", "maxLength", "format"})
_COMBINED = frozenset({"$ref", "anyOf", "oneOf", "allOf"})
_OF_OTHERS = frozenset(
    {"properties", "required", "additionalProperties", "patternProperties", "minProperties", "maxProperties"}
    | {"items", "prefixItems", "additionalItems", "minItems", "maxItems", "uniqueItems", "contains", "minContains"}
    | {"maxContains", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "propertyNames"}
    | {"dependentRequired", "dependentSchemas", "dependencies", "unevaluatedItems", "unevaluatedProperties"}
)
# Of the schema of all parameters; what says nothing about those that are listed may stand.
_PARAMETERS_KEYS = frozenset(
    {"type", "properties", "required", "additionalProperties", "unevaluatedProperties", "$ref"}
)
_LABEL = "[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
_BYTE = "(25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
# Formats of texts: these patterns admit valid ones alone, though not every valid one.
FORMATS = {
    **PATTERNS,
    "uuid": "[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}",
    "ipv4": rf"({_BYTE}\.){{3}}{_BYTE}",
    "ipv6": "([0-9a-f]{1,4}:){7}[0-9a-f]{1,4}",
    "hostname": rf"{_LABEL}(\.{_LABEL}){{0,3}}",
    "email": rf"[A-Za-z0-9_+-]{{1,32}}(\.[A-Za-z0-9_+-]{{1,16}})?@({_LABEL}\.){{1,2}}[a-z]{{2,12}}",
    "uri": rf"[a-z][a-z0-9+-]{{0,15}}://{_LABEL}(\.{_LABEL}){{0,3}}(:[0-9]{{1,4}})?(/[A-Za-z0-9._~!$&'()*+,;=:@-]*)*"
    r"(\?[A-Za-z0-9._~!$&'()*+,;=:@/?-]*)?(#[A-Za-z0-9._~!$&'()*+,;=:@/?-]*)?",
    "duration": "P([0-9]{1,4}Y([0-9]{1,2}M([0-9]{1,2}D)?)?|[0-9]{1,4}D|[0-9]{1,4}W)",
}


def kinds(root: Any, spec: Any, depth: int = 0) -> set[str]:
    """The JSON types that a value may have; empty where the schema does not say."""
    if not isinstance(spec, dict) or depth > MAX_FOLLOWED:
        return set()
    kind = spec.get("type")
    found = {kind} if isinstance(kind, str) else {item for item in kind or () if isinstance(item, str)}
    if found:
        return found
    for key in ("anyOf", "oneOf", "allOf"):
        for part in spec.get(key) or ():
            found |= kinds(root, part, depth + 1)
    if not found and isinstance(spec.get("$ref"), str):
        found = kinds(root, _follow(root, spec["$ref"]), depth + 1)
    values = spec.get("enum", [spec["const"]] if "const" in spec else None)
    if not found and isinstance(values, list) and values and all(isinstance(item, str) for item in values):
        found.add("string")
    return found


def _follow(root: Any, reference: str) -> Any:
    try:
        return _schema.resolve(root, reference, "#")[1] if isinstance(root, dict) else None
    except BadRequest:
        return None


def parameters(schema: dict[str, Any]) -> Iterator[tuple[str, Any, bool]]:
    """(key, schema, whether it must be there) of every parameter, those that are listed first.

    Raises:
        Unspeakable: if more is said of the parameters than each one's schema.
    """
    plain, seen = schema, 0
    while isinstance(plain.get("$ref"), str):
        target = _follow(schema, plain["$ref"])
        seen += 1
        if not isinstance(target, dict) or seen > MAX_FOLLOWED or _constraining(plain) != {"$ref"}:
            raise Unspeakable(f"its reference {plain['$ref']!r} is not to a schema of parameters alone")
        plain = target
    beyond = sorted(_constraining(plain) - _PARAMETERS_KEYS)
    if beyond:
        raise Unspeakable(f"{', '.join(beyond)} beside the properties can only be enforced in JSON")
    kind = plain.get("type", "object")
    if "object" not in ([kind] if isinstance(kind, str) else kind):
        raise Unspeakable("its parameters are not an object")
    listed = plain.get("properties") or {}
    must = [key for key in plain.get("required") or () if isinstance(key, str)]
    others = plain.get("additionalProperties", True)
    for key, spec in listed.items():
        if spec is False and key in must:
            raise Unspeakable(f"the parameter {key!r} is required and forbidden")
        if spec is not False:
            yield key, spec, key in must
    for key in must:
        if key not in listed:
            if others is False:
                raise Unspeakable(f"the parameter {key!r} is required and forbidden")
            yield key, others, True


def listed(schema: dict[str, Any]) -> list[str]:
    """The names of the parameters that a schema lists, whatever else it says."""
    while isinstance(schema.get("$ref"), str) and "properties" not in schema:
        target = _follow(schema, schema["$ref"])
        if not isinstance(target, dict) or "$ref" in target:
            return []
        schema = target
    found = schema.get("properties")
    return list(found) if isinstance(found, dict) else []


def _constraining(spec: dict[str, Any]) -> set[str]:
    return {key for key in spec if key in _schema.CONSTRAINING}


def is_open(root: Any, spec: Any, depth: int = 0) -> bool:
    """Whether any value at all is valid."""
    if spec is True:
        return True
    if not isinstance(spec, dict) or depth > MAX_FOLLOWED:
        return False
    if _constraining(spec) == {"$ref"}:
        return is_open(root, _follow(root, spec["$ref"]), depth + 1)
    return not _constraining(spec)


def alone(root: dict[str, Any], spec: Any) -> Any:
    """A part of a schema as a schema of its own, with what it refers to."""
    needed: dict[str, dict[str, Any]] = {}
    stack: list[Any] = [spec]
    while stack:
        item = stack.pop()
        if isinstance(item, list):
            stack.extend(item)
        if not isinstance(item, dict):
            continue
        stack.extend(item.values())
        reference = item.get("$ref")
        if not isinstance(reference, str):
            continue
        steps = reference.split("/")
        if len(steps) < 3 or steps[0] != "#" or steps[1] not in _DEFINITIONS:
            raise Unspeakable(f"it refers to {reference!r}, which is not among its definitions")
        name = steps[2].replace("~1", "/").replace("~0", "~")
        held = needed.setdefault(steps[1], {})
        if name not in held:
            if name not in (root.get(steps[1]) or {}):
                raise Unspeakable(f"its reference {reference!r} points to nothing")
            held[name] = root[steps[1]][name]
            stack.append(held[name])
    return {**spec, **needed} if needed else spec


def as_json(root: dict[str, Any], spec: Any) -> Shape:
    return json_of(alone(root, spec))


def not_text(root: dict[str, Any], spec: Any) -> Shape | None:
    """JSON of the values that are no texts; None if there are none."""
    found = kinds(root, spec)
    if "string" not in found and found:
        return as_json(root, spec)
    if found == {"string"} or (not any(kind in found for kind in _NOT_TEXT) and found and "integer" not in found):
        return None
    kept = [kind for kind in (*_NOT_TEXT, "integer") if kind in found] or list(_NOT_TEXT)
    own = alone(root, spec if isinstance(spec, dict) else {})
    shared = {key: own[key] for key in _DEFINITIONS if key in own}
    inner = {key: value for key, value in own.items() if key not in _DEFINITIONS}
    return json_of({"type": kept, "allOf": [inner], **shared})


# Texts


@dataclass(frozen=True)
class TextRule:
    """What texts a branch of a schema admits. `values`: these alone."""

    patterns: tuple[str, ...] = ()
    shortest: int = 0
    longest: int | None = None
    values: tuple[str, ...] | None = None

    def both(self, other: TextRule) -> TextRule:
        lengths = [item for item in (self.longest, other.longest) if item is not None]
        values = self.values if other.values is None else other.values
        if self.values is not None and other.values is not None:
            values = tuple(item for item in self.values if item in other.values)
        shortest = max(self.shortest, other.shortest)
        return TextRule(self.patterns + other.patterns, shortest, min(lengths, default=None), values)

    @property
    def free(self) -> bool:
        return self == TextRule()

    def shapes(self, end: str, trims: bool) -> list[Shape]:
        """Texts before `end`. `trims`: the parser takes a line break off either end of them."""
        if self.values is not None:
            return [literal(item) for item in self.values if self._holds(item, end, trims)]
        if self.longest is not None and self.longest < self.shortest:
            return []
        patterns = self.patterns
        if trims and not self.free:
            patterns = (*patterns, r"([^\n]|[^\n](.|\n)*[^\n])?")
        return [text([end], patterns, self.shortest, self.longest)]

    def _holds(self, value: str, end: str, trims: bool) -> bool:
        if end in value or (trims and (value.startswith("\n") or value.endswith("\n"))):
            return False
        long = self.longest is not None and len(value) > self.longest
        return not long and len(value) >= self.shortest and all(_matches(item, value) for item in self.patterns)


def _matches(pattern: str, value: str) -> bool:
    try:
        return re.fullmatch(pattern, value) is not None
    except re.error:
        raise Unspeakable(f"the pattern {pattern!r:.80} is not understood beside an enumeration") from None


def texts(root: dict[str, Any], spec: Any, depth: int = 0) -> list[TextRule]:
    """The branches of a schema that admit texts.

    Raises:
        Unspeakable: if a keyword cannot be enforced on a bare text.
    """
    if not isinstance(spec, dict):
        return [TextRule()] if spec is True else []
    if depth > MAX_FOLLOWED:
        raise Unspeakable("its schema refers to itself too deeply")
    kind = spec.get("type", "string")
    if "string" not in ([kind] if isinstance(kind, str) else kind):
        return []
    beyond = sorted(_constraining(spec) - _TEXT_KEYS - _COMBINED - _OF_OTHERS)
    if beyond:
        raise Unspeakable(f"{', '.join(beyond)} cannot be enforced on a text")
    found = [_own(spec)]
    if isinstance(spec.get("$ref"), str):
        found = _product(found, texts(root, _follow(root, spec["$ref"]), depth + 1))
    for part in spec.get("allOf") or ():
        found = _product(found, texts(root, part, depth + 1))
    for key in ("anyOf", "oneOf"):
        if isinstance(spec.get(key), list):
            branches = [rule for part in spec[key] for rule in texts(root, part, depth + 1)]
            if key == "oneOf" and len(branches) > 1 and not _apart(branches):
                raise Unspeakable("oneOf with several branches of texts cannot be enforced")
            found = _product(found, branches)
    return found


def _apart(rules: list[TextRule]) -> bool:
    """Whether the branches enumerate their texts, each its own."""
    values = [item for rule in rules for item in rule.values or ()]
    return all(rule.values is not None for rule in rules) and len(values) == len(set(values))


def _product(left: list[TextRule], right: list[TextRule]) -> list[TextRule]:
    if len(left) * len(right) > MAX_BRANCHES:
        raise Unspeakable(f"it has more than {MAX_BRANCHES} branches of texts")
    return [one.both(other) for one in left for other in right]


def _own(spec: dict[str, Any]) -> TextRule:
    low, high = (int(spec[key]) if key in spec else None for key in ("minLength", "maxLength"))
    if low is not None and low > MAX_SHORTEST:
        raise Unspeakable(f"minLength {low} is above {MAX_SHORTEST}")
    rule = TextRule((), low or 0, high)
    if "pattern" in spec:
        rule = replace(rule, patterns=(whole(spec["pattern"]),))
    if "format" in spec and spec["format"] not in _schema.ANNOTATION_FORMATS:
        if spec["format"] not in FORMATS:
            raise Unspeakable(f"the format {spec['format']!r:.80} cannot be enforced; known: {', '.join(FORMATS)}")
        rule = replace(rule, patterns=(*rule.patterns, FORMATS[spec["format"]]))
    for values in (spec.get("enum"), [spec["const"]] if "const" in spec else None):
        if isinstance(values, list):
            rule = rule.both(TextRule(values=tuple(item for item in values if isinstance(item, str))))
    return rule


def whole(pattern: str) -> str:
    """A schema's pattern, which may match anywhere, as one that matches a text as a whole."""
    start = pattern.startswith("^")
    end = pattern.endswith("$") and (len(pattern) - len(pattern[:-1].rstrip("\\"))) % 2 == 1
    inner = pattern[start : len(pattern) - end]
    depth = place = 0
    while place < len(inner):
        char = inner[place]
        if char == "\\":
            if inner[place + 1 : place + 2] in ("b", "B"):
                raise Unspeakable(f"the pattern {pattern!r:.80} asks for a border of words")
            place += 1
        elif char == "[":
            close = re.compile(r"\[\^?\]?(?:\\.|[^\]\\])*\]", re.DOTALL).match(inner, place)
            place = close.end() - 1 if close else place
        elif char in "^$" or (char == "|" and not depth and (start or end)):
            raise Unspeakable(f"the pattern {pattern!r:.80} is anchored in a part of it")
        depth += (char == "(") - (char == ")")
        place += 1
    anything = r"(.|\n)*"
    return f"{'' if start else anything}({inner}){'' if end else anything}"


# Single values


def constants(root: Any, spec: Any, depth: int = 0) -> list[Any] | None:
    """The values that an enumeration or a constant leaves; None where there is neither."""
    if not isinstance(spec, dict) or depth > MAX_FOLLOWED:
        return None
    found = spec.get("enum", [spec["const"]] if "const" in spec else None)
    if found is None and isinstance(spec.get("$ref"), str):
        return constants(root, _follow(root, spec["$ref"]), depth + 1)
    return found if isinstance(found, list) else None


def admits_null(root: Any, spec: Any, depth: int = 0) -> bool:
    """Whether null is a valid value. Keywords that are not looked at say nothing of null."""
    if not isinstance(spec, dict) or depth > MAX_FOLLOWED:
        return spec is True
    kind = spec.get("type", "null")
    if "null" not in ([kind] if isinstance(kind, str) else kind):
        return False
    if ("enum" in spec and None not in spec["enum"]) or spec.get("const") is not None:
        return False
    if isinstance(spec.get("$ref"), str) and not admits_null(root, _follow(root, spec["$ref"]), depth + 1):
        return False
    if not all(admits_null(root, part, depth + 1) for part in spec.get("allOf") or ()):
        return False
    for key in ("anyOf", "oneOf"):
        branches = [admits_null(root, part, depth + 1) for part in spec.get(key) or ()]
        if branches and (not any(branches) or (key == "oneOf" and sum(branches) > 1)):
            return False
    return "not" not in spec and "if" not in spec


def dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
