"""Keywords that no grammar has, rewritten into those that it has: `not`, `if`, `dependentRequired`, `dependentSchemas`,
`propertyNames`, `contains` and `uniqueItems`, where that is exact. What stays is refused by name.

A condition becomes a choice: `if C then T else E` is "C and T, or E without C". A schema is split into the variants
that its conditions leave, each a plain schema.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
import re
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from phloem.grammar.schema.algebra import MAX_VARIANTS, both, constraining, size, values_of, without
from phloem.grammar.schema.names import Schema, fail, reachable, resolve
from phloem.grammar.schema.oneof import disjoint, key_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from phloem.grammar.schema.algebra import Any_

MAX_LISTS = 2000  # that `uniqueItems` is spelled out as
MAX_PLACES = 16  # of the item that `contains` asks for
PLACES = 8  # of it in a list without maxItems
MAX_SIZE = 200_000  # characters of the variants of one schema
MAX_TOTAL = 1_000_000  # of all of them

_CONDITIONS = ("not", "if", "then", "else", "dependentRequired", "dependentSchemas", "dependencies")
# What stays where it is when a schema is split: references lead there.
_STAYS = ("$defs", "definitions", "$id", "id", "$schema", "$anchor", "$comment", "title", "description", "default")


def rewrite(root: Schema, narrow: bool) -> None:
    """Rewrite in place what can be. `narrow`: also where fewer values are left than the schema admits.

    Raises:
        BadRequest: for conditions that leave nothing, or that multiply too far.
    """
    targets = _reference_paths(root)
    total = 0
    for path, node in reachable(root):
        if isinstance(node, dict):
            _names(node)
            _unique(root, node, narrow)
            _contains(node, narrow)
            total += _conditions(root, node, path, targets)
            if total > MAX_TOTAL:
                fail(path, "the variants that conditions leave are too many")


def _reference_paths(root: Schema) -> set[str]:
    return {
        unquote(node["$ref"])
        for _, node in reachable(root)
        if isinstance(node, dict) and isinstance(node.get("$ref"), str)
    }


# --- if, not, dependencies


def _conditions(root: Schema, node: Schema, path: str, targets: set[str]) -> int:
    """Split a schema into the variants that its conditions leave. Returns their size in characters."""
    if "if" not in node:
        node.pop("then", None)
        node.pop("else", None)
    elif "then" not in node and "else" not in node:
        del node["if"]
    members = node.get("allOf", [])
    own = [item for item in members if isinstance(item, dict) and _is_condition(item)]
    if not any(key in node for key in _CONDITIONS) and not own:
        return 0
    if any(_moves(target, path) for target in targets) or re.search(
        '"\\$(dynamicA|a)nchor"', json.dumps(constraining(node))
    ):
        return 0  # a reference leads to what would move
    base = {key: value for key, value in node.items() if key not in (*_CONDITIONS, *_STAYS)}
    if own:
        base["allOf"] = [item for item in members if not any(item is one for one in own)]
        if not base["allOf"]:
            del base["allOf"]
    variants: list[Any_] | None = [base]
    for holder in (node, *own):
        for asked, then, other in _steps(holder):
            variants = _branch(root, variants, asked, then, other)
            if variants is None:
                return 0
    if not variants:
        fail(f"{path}/{next((key for key in _CONDITIONS if key in node), 'allOf')}", "no value is left")
    written = size(variants)
    if written > MAX_SIZE:
        return 0
    kept = {key: value for key, value in node.items() if key in _STAYS}
    plain = copy.deepcopy(variants)
    node.clear()
    only = plain[0] if len(plain) == 1 else None
    node.update({**kept, **(only if isinstance(only, dict) else {"anyOf": plain})})
    return written


def _is_condition(schema: Schema) -> bool:
    keys = set(constraining(schema)) | ({"then", "else"} & set(schema))
    return bool(keys) and keys <= set(_CONDITIONS)


def _moves(target: str, path: str) -> bool:
    """Whether a reference leads inside this schema, but not to its definitions."""
    if not target.startswith("#"):
        return True  # by the schema's own address: where to is not worth finding out
    inside = target.removeprefix(path) if target.startswith(f"{path}/") else ""
    return bool(inside) and not inside.startswith(("/$defs/", "/definitions/"))


def _steps(node: Schema) -> Iterator[tuple[Any_, Any_, Any_]]:
    """Every condition as (if, then, else)."""
    if "not" in node:
        yield node["not"], False, True
    if "if" in node:
        yield node["if"], node.get("then", True), node.get("else", True)
    for key in ("dependentRequired", "dependentSchemas", "dependencies"):
        for name, asked in node.get(key, {}).items():
            then: Any_ = {"required": asked} if isinstance(asked, list) else asked
            yield {"type": "object", "required": [name]}, then, True


def _branch(root: Schema, variants: list[Any_] | None, asked: Any_, then: Any_, other: Any_) -> list[Any_] | None:
    found: list[Any_] = []
    for base in variants or []:
        rest = without(root, base, asked)
        if rest is None:
            return None
        found += [both(both(base, asked), then), *(both(item, other) for item in rest)]
    found = [item for item in found if item is not False]
    return found if len(found) <= MAX_VARIANTS else None


# --- propertyNames


def _names(node: Schema) -> None:
    """A finite set of names is listed, a pattern becomes `patternProperties`; other properties are forbidden."""
    rule = node.get("propertyNames")
    if rule is None or "patternProperties" in node:
        return
    keys = constraining(rule) if isinstance(rule, dict) else {}
    if keys.get("type", "string") not in ("string", ["string"]):
        rule, keys = False, {}
    keys.pop("type", None)
    listed, others = node.get("properties", {}), node.get("additionalProperties", True)
    if rule is False:
        node["maxProperties"] = 0
    elif not keys:
        pass
    elif set(keys) <= {"enum", "const"}:
        allowed = [name for name in values_of(rule) or [] if isinstance(name, str)]
        node["properties"] = {
            **{name: item if name in allowed else False for name, item in listed.items()},
            **{name: others for name in allowed if name not in listed},
        }
        node["additionalProperties"] = False
    else:
        pattern = _name_pattern(keys)
        fits = None if pattern is None else _matches(pattern, list(listed))
        if pattern is None or fits is None or (others is not True and others != {} and any(fits.values())):
            return
        if listed:
            node["properties"] = {name: item if fits[name] else False for name, item in listed.items()}
        node["patternProperties"], node["additionalProperties"] = {pattern: others}, False
    del node["propertyNames"]


def _name_pattern(keys: Schema) -> str | None:
    if set(keys) == {"pattern"}:
        return keys["pattern"]
    if set(keys) <= {"minLength", "maxLength"}:
        least, most = int(keys.get("minLength", 0)), keys.get("maxLength")
        return rf"^(.|\n){{{least},{'' if most is None else int(most)}}}$"
    return None


def _matches(pattern: str, names: list[str]) -> dict[str, bool] | None:
    """Which names a pattern finds itself in; None where that cannot be told here as everywhere."""
    if not names:
        return {}
    if re.search(r"\\[^dwsDWSnrt.\-+*?()\[\]{}|^$/\\]|\(\?", pattern):
        return None
    try:
        found = re.compile(re.sub(r"\$$", r"\\Z", pattern), re.ASCII)
    except re.error:
        return None
    return {name: found.search(name) is not None for name in names}


# --- arrays


def _unique(root: Schema, node: Schema, narrow: bool) -> None:
    if node.get("uniqueItems") is not True:
        node.pop("uniqueItems", None)
        return
    if node.get("maxItems", math.inf) <= 1 or _differ(root, node):
        del node["uniqueItems"]
        return
    keys = set(constraining(node))
    if "type" not in node and not (narrow and "items" in node):
        return
    if node.get("type", "array") not in ("array", ["array"]) or not keys <= {
        *("type", "items", "minItems", "maxItems", "uniqueItems")
    }:
        return
    values = _finite(root, node.get("items"))
    least = int(node.get("minItems", 0))
    if values is None:
        return
    most = min(int(node.get("maxItems", len(values))), len(values))
    if sum(math.perm(len(values), count) for count in range(least, most + 1)) > MAX_LISTS:
        return
    lists = [list(item) for count in range(least, most + 1) for item in itertools.permutations(values, count)]
    if not lists or len(json.dumps(lists)) > MAX_SIZE:
        return
    for key in ("items", "minItems", "maxItems", "uniqueItems"):
        node.pop(key, None)
    node.update({"type": "array", "enum": lists})


def _differ(root: Schema, node: Schema) -> bool:
    """Whether the items of a list of fixed length can never be equal."""
    items = node.get("prefixItems")
    if not isinstance(items, list) or (node.get("items") is not False and node.get("maxItems", math.inf) > len(items)):
        return False
    return all(disjoint(root, a, b) for a, b in itertools.combinations(items, 2))


def _finite(root: Schema, items: Any) -> list[Any] | None:
    """The different values that items can have, where they can be told."""
    if not isinstance(items, dict):
        return None
    if set(constraining(items)) == {"$ref"}:
        items = resolve(root, items["$ref"], "#")[1]
    if not isinstance(items, dict):
        return None
    known = values_of(items)
    if known is not None and set(constraining(items)) <= {"enum", "const", "type"}:
        return list({key_of(value): value for value in known}.values())
    plain = {"boolean": [False, True], "null": [None]}
    return plain.get(str(items.get("type"))) if set(constraining(items)) == {"type"} else None


def _contains(node: Schema, narrow: bool) -> None:
    if "contains" not in node:
        for key in ("minContains", "maxContains"):
            node.pop(key, None)
        return
    rule, items = node["contains"], node.get("items", True)
    least, most = int(node.get("minContains", 1)), node.get("maxContains")
    if most is not None and most >= node.get("maxItems", math.inf):
        most = None
    every = not (isinstance(rule, dict) and constraining(rule)) and rule is not False
    if every or ("prefixItems" not in node and key_of(rule) == key_of(items)):
        node["minItems"] = max(node.get("minItems", 0), least)
        if most is not None:
            node["maxItems"] = min(node.get("maxItems", most), most)
    elif most is not None or least > 1 or rule is False or (least and not _put_first(node, rule, items, narrow)):
        return
    for key in ("contains", "minContains", "maxContains"):
        node.pop(key, None)


def _put_first(node: Schema, rule: Any_, items: Any_, narrow: bool) -> bool:
    """A choice of the place where an item that is asked for stands. Without maxItems, one of the first few."""
    bounded = node.get("maxItems", math.inf) <= MAX_PLACES
    if "prefixItems" in node or "anyOf" in node or "$ref" in node or isinstance(items, list):
        return False
    if node.get("type") not in ("array", ["array"]) or not (bounded or narrow):
        return False
    one = both(items, rule)
    if one is False:
        return False
    least = int(node.get("minItems", 0))
    node["anyOf"] = [
        {"prefixItems": [*([items] * at), one], "items": items, "minItems": max(least, at + 1)}
        for at in range(int(node["maxItems"]) if bounded else PLACES)
    ]
    node.pop("items", None)
    node.pop("minItems", None)
    node["anyOf"] = copy.deepcopy(node["anyOf"])
    return True
