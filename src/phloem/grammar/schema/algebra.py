"""Conjunction and difference of JSON schemas, both exact: what `if`, `not` and their like are compiled with.

A schema here is a dict, True or False; False admits nothing. Neither function changes what it is given.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from phloem.grammar.schema.names import CONSTRAINING, Schema, resolve
from phloem.grammar.schema.oneof import key_of, type_of

if TYPE_CHECKING:
    from collections.abc import Callable

Any_ = Schema | bool
MAX_VARIANTS = 64

_SIX = ("null", "boolean", "object", "array", "number", "string")
_LOW = ("minimum", "exclusiveMinimum", "minLength", "minItems", "minProperties")
_HIGH = ("maximum", "exclusiveMaximum", "maxLength", "maxItems", "maxProperties")
# keyword -> the type it speaks of, and the bound of everything that it excludes.
_OPPOSITE: dict[str, tuple[str, Callable[[Any], Schema | None]]] = {
    "minimum": ("number", lambda n: {"exclusiveMaximum": n}),
    "maximum": ("number", lambda n: {"exclusiveMinimum": n}),
    "exclusiveMinimum": ("number", lambda n: {"maximum": n}),
    "exclusiveMaximum": ("number", lambda n: {"minimum": n}),
    **{f"max{of}": (kind, lambda n, of=of: {f"min{of}": int(n) + 1}) for kind, of in (
        ("string", "Length"), ("array", "Items"), ("object", "Properties"))},
    **{f"min{of}": (kind, lambda n, of=of: {f"max{of}": int(n) - 1} if n >= 1 else None) for kind, of in (
        ("string", "Length"), ("array", "Items"), ("object", "Properties"))},
}  # fmt: skip


def constraining(schema: Schema) -> Schema:
    """What of a schema restricts values."""
    return {key: value for key, value in schema.items() if key in CONSTRAINING}


# --- both


def both(a: Any_, b: Any_) -> Any_:
    """What is valid under `a` and under `b`; False where that is seen to be nothing."""
    if a is False or b is False:
        return False
    if a is True or not a:
        return b
    if b is True or not b:
        return a
    out = dict(a)
    rest = constraining(b)
    if ("patternProperties" in a or "patternProperties" in b) and any(
        key in b for key in ("properties", "additionalProperties", "patternProperties")
    ):
        return _beside(out, rest)
    members = _members(a, b)
    for key, value in rest.items():
        if key in ("properties", "additionalProperties"):
            continue
        if not _take(out, key, value):
            out = _beside(out, {key: value})
    out.update(members)
    known = values_of(out)
    if known is not None:
        out.pop("const", None)
        out["enum"] = known
    return False if _is_empty(out) else out


def _beside(out: Schema, other: Schema) -> Schema:
    return {**out, "allOf": [*out.get("allOf", []), other]}


def _take(out: Schema, key: str, value: Any) -> bool:
    """Add one keyword; False where the two cannot be one."""
    if key == "type":
        types = [name for name in _types(out) if _admits(value, name)]
        types += [name for name in _list(value) if name == "integer" and name not in types and "number" in _types(out)]
        out["type"] = types[0] if len(types) == 1 else types
    elif key in ("enum", "const"):
        known = values_of(out)
        wanted = {key_of(item) for item in (value if key == "enum" else [value])}
        kept = [item for item in known if key_of(item) in wanted] if known is not None else None
        out.pop("const", None)
        out["enum"] = (value if key == "enum" else [value]) if kept is None else kept
    elif key == "required":
        out["required"] = list(dict.fromkeys([*out.get("required", []), *value]))
    elif key in _LOW:
        out[key] = max(out.get(key, value), value)
    elif key in _HIGH:
        out[key] = min(out.get(key, value), value)
    elif key == "allOf":
        out["allOf"] = [*out.get("allOf", []), *value]
    elif key in ("items", "prefixItems") and ("items" in out or "prefixItems" in out):
        return key_of(out.get(key)) == key_of(value) and ("items" in out) != ("prefixItems" in out)
    elif key in out:
        return key_of(out[key]) == key_of(value)
    else:
        out[key] = value
    return True


def _members(a: Schema, b: Schema) -> Schema:
    """`properties` and `additionalProperties` of both: each side's rule for others holds for names it does not list."""
    first, second = a.get("properties", {}), b.get("properties", {})
    other_a, other_b = a.get("additionalProperties", True), b.get("additionalProperties", True)
    names = [*first, *(name for name in second if name not in first)]
    found: Schema = {}
    if names:
        found["properties"] = {name: both(first.get(name, other_a), second.get(name, other_b)) for name in names}
    if "additionalProperties" in a or "additionalProperties" in b:
        found["additionalProperties"] = both(other_a, other_b)
    return found


def _list(value: Any) -> list[str]:
    return value if isinstance(value, list) else [value]


def _types(schema: Schema) -> list[str]:
    return list(_list(schema["type"])) if "type" in schema else list(_SIX)


def _admits(names: Any, kind: str) -> bool:
    return kind in _list(names) or (kind == "integer" and "number" in _list(names))


def values_of(schema: Schema) -> list[Any] | None:
    """The values that `enum` or `const` leave, those of other types than `type` left out."""
    if "const" not in schema and "enum" not in schema:
        return None
    values = [schema["const"]] if "const" in schema else schema["enum"]
    if "const" in schema and "enum" in schema:
        values = [item for item in values if key_of(item) in {key_of(other) for other in schema["enum"]}]
    return [item for item in values if _fits(item, schema)]


def _fits(value: Any, schema: Schema) -> bool:
    """Whether a value keeps to `type` and to bounds."""
    if not isinstance(value, bool) and isinstance(value, (int, float)) and not _within(value, schema, "imum"):
        return False
    for kind, of in (((str), "Length"), (list, "Items"), (dict, "Properties")):
        if isinstance(value, kind) and not _within(len(value), schema, of):
            return False
    if "type" not in schema:
        return True
    whole = not isinstance(value, bool) and isinstance(value, (int, float)) and float(value).is_integer()
    return type_of(value) in _types(schema) or (whole and "integer" in _types(schema))


def _within(size: float, schema: Schema, of: str) -> bool:
    if size < schema.get(f"min{of}", size) or size > schema.get(f"max{of}", size):
        return False
    low, high = schema.get("exclusiveMinimum"), schema.get("exclusiveMaximum")
    return of != "imum" or ((low is None or size > low) and (high is None or size < high))


def _is_empty(schema: Schema) -> bool:
    if schema.get("type") == [] or values_of(schema) == []:
        return True
    if any(schema.get("properties", {}).get(name) is False for name in schema.get("required", [])):
        return _types(schema) == ["object"]
    return False


# --- without


def without(root: Schema, base: Any_, other: Any_, depth: int = 8) -> list[Any_] | None:
    """Schemas that together admit what is valid under `base` and not under `other`; None where nothing expresses that.

    `root` is what references lead into; `depth` bounds how far they and members are followed.
    """
    if depth == 0:
        return None
    if base is False or other is True:
        return []
    if other is False:
        return [base]
    base = {} if base is True else base
    parts = constraining(other)
    found: list[Any_] = []
    for key, value in parts.items():
        some = _without_part(root, base, key, value, depth - 1)
        if some is None:
            return None
        found += [item for item in some if item is not False]
        if len(found) > MAX_VARIANTS:
            return None
    return found


def _without_part(root: Schema, base: Schema, key: str, value: Any, depth: int) -> list[Any_] | None:
    match key:
        case "$ref":
            return without(root, base, resolve(root, value, "#")[1], depth)
        case "not":
            return [both(base, value)]
        case "allOf" if len(value) <= MAX_VARIANTS:
            return _union(without(root, base, item, depth) for item in value)
        case "anyOf" if len(value) <= MAX_VARIANTS:
            left: list[Any_] | None = [base]
            for item in value:
                left = None if left is None else _union(without(root, one, item, depth) for one in left)
            return left
        case "type":
            return _without_types(base, value)
        case "const" | "enum":
            return _without_values(base, [value] if key == "const" else value)
        case "required":
            return [both(base, {"type": "object", "properties": {name: False}}) for name in value]
        case "properties":
            return _union(_without_member(root, base, name, item, depth) for name, item in value.items())
        case _ if key in _OPPOSITE:
            kind, opposite = _OPPOSITE[key]
            bound = opposite(value)
            return [] if bound is None else [both(base, {"type": kind, **bound})]
        case _:
            return None


def _union(several: Any) -> list[Any_] | None:
    found: list[Any_] = []
    for item in several:
        if item is None or len(found) > MAX_VARIANTS:
            return None
        found += item
    return found


def _without_member(root: Schema, base: Schema, name: str, other: Any_, depth: int) -> list[Any_] | None:
    """An object that has this member, with a value that is not valid under `other`."""
    if "patternProperties" in base:
        return None
    own = base.get("properties", {}).get(name, base.get("additionalProperties", True))
    left = without(root, own, other, depth)
    if left is None:
        return None
    found: list[Any_] = []
    for item in left:
        one = both(base, {"type": "object", "required": [name]})
        if isinstance(one, dict) and item is not False:
            found.append({**one, "properties": {**one.get("properties", {}), name: item}})
    return found


def _without_types(base: Schema, names: Any) -> list[Any_] | None:
    removed = set(_list(names))
    known = values_of(base)
    if known is not None:
        kept = [item for item in known if not _fits(item, {"type": list(removed)})]
        return [both(base, {"enum": kept})]
    declared = _types(base)
    if "integer" in removed and "number" not in removed and "number" in declared:
        return None  # numbers that are not whole: no keyword says that
    left = [name for name in declared if name not in removed and not (name == "integer" and "number" in removed)]
    return [both(base, {"type": left})] if left else []


def _without_values(base: Schema, values: list[Any]) -> list[Any_] | None:
    barred = {key_of(item) for item in values}
    known = values_of(base)
    if known is not None:
        return [both(base, {"enum": [item for item in known if key_of(item) not in barred]})]
    found: list[Any_] = []
    declared = _types(base)
    hit = {type_of(item) for item in values}
    free = [name for name in declared if name not in hit and not (name == "integer" and "number" in hit)]
    if free:
        found.append(both(base, {"type": free}) if len(free) < len(declared) else base)
    for name in declared:
        if name in free or name == "null":
            continue
        own = [item for item in values if type_of(item) == ("number" if name == "integer" else name)]
        if name == "boolean":
            kept = [item for item in (False, True) if item not in own]
            found.append(both(base, {"enum": kept}) if kept else False)
        elif name == "string":
            found.append(both(base, {"type": "string", "pattern": any_but(own)}))
        elif name in ("number", "integer"):
            ends = sorted(own)
            edges = [({"exclusiveMinimum": low} if low is not None else {}) | (
                {"exclusiveMaximum": high} if high is not None else {}
            ) for low, high in zip([None, *ends], [*ends, None], strict=True)]  # fmt: skip
            found += [both(base, {"type": name, **edge}) for edge in edges if name == "number" or _has_whole(edge)]
        else:
            return None  # all objects or arrays but one
    return found


def _has_whole(edge: Schema) -> bool:
    low, high = edge.get("exclusiveMinimum"), edge.get("exclusiveMaximum")
    return low is None or high is None or int(low // 1) + 1 < high


def any_but(texts: list[str]) -> str:
    """A pattern without look-ahead for every text that is none of these."""
    return f"^({_any_but(sorted(set(texts)))})$"


def _any_but(tails: list[str]) -> str:
    """For what follows a common beginning: `tails` are the endings that must not come."""
    heads = {tail[0] for tail in tails if tail}
    anything = r"(.|\n)*"
    if not heads:
        return r"(.|\n)+"
    barred = "".join(_in_class(head) for head in sorted(heads))
    ways = [f"[^{barred}]{anything}"]
    ways += [
        f"{_literal(head)}({_any_but([tail[1:] for tail in tails if tail[:1] == head])})" for head in sorted(heads)
    ]
    return "|".join(ways if "" in tails else ["", *ways])


def _in_class(char: str) -> str:
    return f"\\{char}" if char in "\\]^-[&~" else char


def _literal(char: str) -> str:
    return re.escape(char) if char.isascii() and char.isprintable() and char != " " else char


def size(schemas: list[Any_]) -> int:
    """Characters that schemas take as JSON."""
    return len(json.dumps(schemas))
