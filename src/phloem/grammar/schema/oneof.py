"""Two rewritings of a schema that only narrow what is generated, so that every text stays valid under the original.

`oneOf` becomes `anyOf` where its branches are proven exclusive: then "one of" and "any of" are the same. An object that
lists `properties` and says nothing of others is closed: a model that may add properties without end does. Exclusiveness
is judged before anything narrows a branch: a value that is in one narrowed branch alone may have been in two.
"""

from __future__ import annotations

import json
from typing import Any

from phloem.grammar.schema.names import CONSTRAINING, Schema, fail, reachable, resolve

_ALL = frozenset(["null", "boolean", "object", "array", "number", "string"])
_DEPTH = 8


def settle(root: Schema) -> bool:
    """`oneOf` of exclusive branches becomes `anyOf`, in place. Returns whether none is left."""
    nodes = [(path, node) for path, node in reachable(root) if isinstance(node, dict) and "oneOf" in node]
    exclusive = [node for path, node in nodes if _is_exclusive(root, node, path)]
    for node in exclusive:
        branches = node.pop("oneOf")
        if "anyOf" in node:
            node["allOf"] = [*node.get("allOf", []), {"anyOf": branches}]
        else:
            node["anyOf"] = branches
    return len(exclusive) == len(nodes)


def close(root: Schema) -> None:
    """Close the objects that list `properties` and say nothing of others, in place.

    Raises:
        BadRequest: for a count of properties that cannot be guaranteed.
    """
    nodes = [(path, node) for path, node in reachable(root) if isinstance(node, dict)]
    kept_open = _applied_together(root, nodes)
    for path, node in nodes:
        if id(node) not in kept_open and _closable(node):
            node["additionalProperties"] = False
        _check_count(node, path)


def _closable(node: Schema) -> bool:
    """`additionalProperties` is read beside `properties` alone: with applicators in the same node it would cut more."""
    if not node.get("properties") or any(
        key in node
        for key in ("additionalProperties", "patternProperties", "unevaluatedProperties", "$ref", "allOf", "anyOf")
    ):
        return False
    known = node["properties"]
    return (
        "oneOf" not in node
        and all(name in known for name in node.get("required", []))
        and node.get("minProperties", 0) <= len(known)
    )


def _applied_together(root: Schema, nodes: list[tuple[str, Any]]) -> set[int]:
    """Nodes that hold together with another on the same value: closing one would forbid what the other asks for."""
    found: set[int] = set()
    for path, node in nodes:
        keys = [key for key in ("$ref", "allOf", "anyOf", "oneOf") if key in node]
        shared = any(key in CONSTRAINING and key not in keys for key in node) or len(keys) > 1
        for key in keys:
            # A branch of oneOf stays as it is: what it leaves open decides whether another branch holds too.
            if shared or key in ("allOf", "oneOf"):
                branches = [node[key]] if key != "$ref" else [resolve(root, node["$ref"], path)[1]]
                stack = branches[0][:] if isinstance(branches[0], list) else branches
                _mark(root, stack, found)
    return found


def _mark(root: Schema, stack: list[Any], found: set[int]) -> None:
    while stack:
        node = stack.pop()
        if not isinstance(node, dict) or id(node) in found:
            continue
        found.add(id(node))
        for key in ("allOf", "anyOf", "oneOf"):
            stack.extend(node.get(key, []))
        if isinstance(node.get("$ref"), str):
            stack.append(resolve(root, node["$ref"], "#")[1])


def _check_count(node: Schema, path: str) -> None:
    """Names may repeat among those that a schema does not list, and a repeated name counts once."""
    least = node.get("minProperties", 0)
    if node.get("additionalProperties") is False and not node.get("patternProperties"):
        return
    if least > len(node.get("required", [])) + 1:
        fail(
            f"{path}/minProperties",
            "cannot be guaranteed while other names than `properties` lists are allowed; "
            "list them and set additionalProperties to false",
        )


def _is_exclusive(root: Schema, node: Schema, path: str) -> bool:
    branches = node.get("oneOf")
    if not isinstance(branches, list) or len(branches) > 64:
        return False
    return all(disjoint(root, a, b, path) for i, a in enumerate(branches) for b in branches[:i])


def disjoint(root: Schema, a: Any, b: Any, path: str = "#") -> bool:
    """Whether no value is valid under both schemas; False also where that is not seen."""
    return _disjoint(root, _deref(root, a, path), _deref(root, b, path), _DEPTH)


def _deref(root: Schema, node: Any, path: str) -> Any:
    """A node or, where it is nothing but a reference, what it names."""
    for _ in range(_DEPTH):
        if not isinstance(node, dict) or not isinstance(node.get("$ref"), str):
            break
        if any(key in CONSTRAINING and key != "$ref" for key in node):
            break
        path, node = resolve(root, node["$ref"], path)
    return node


def _disjoint(root: Schema, a: Any, b: Any, depth: int) -> bool:
    """Whether no value is valid under both; False also where that is not seen."""
    if a is False or b is False:
        return True
    if not isinstance(a, dict) or not isinstance(b, dict) or depth == 0:
        return False
    values_a, values_b = _values(a), _values(b)
    if values_a is not None and values_b is not None:
        return not {key_of(value) for value in values_a} & {key_of(value) for value in values_b}
    common = _types(a) & _types(b)
    return all(_disjoint_on(root, kind, a, b, depth) for kind in common)


def _disjoint_on(root: Schema, kind: str, a: Schema, b: Schema, depth: int) -> bool:
    match kind:
        case "object":
            return _disjoint_objects(root, a, b, depth)
        case "number":
            return _above(a, b) or _above(b, a)
        case "string":
            return _least(a, "minLength") > _most(b, "maxLength") or _least(b, "minLength") > _most(a, "maxLength")
        case "array":
            return _least(a, "minItems") > _most(b, "maxItems") or _least(b, "minItems") > _most(a, "maxItems")
        case _:
            return False


def _disjoint_objects(root: Schema, a: Schema, b: Schema, depth: int) -> bool:
    for one, other in ((a, b), (b, a)):
        listed = other.get("properties", {})
        closed = other.get("additionalProperties") is False and not other.get("patternProperties")
        for name in one.get("required", []):
            if closed and name not in listed:
                return True
    for name in set(a.get("required", [])) & set(b.get("required", [])):
        first, second = a.get("properties", {}).get(name), b.get("properties", {}).get(name)
        if first is not None and second is not None:
            pair = (_deref(root, first, "#"), _deref(root, second, "#"))
            if _disjoint(root, *pair, depth - 1):
                return True
    return False


def _values(node: Schema) -> list[Any] | None:
    if "const" in node:
        return [node["const"]]
    return node.get("enum")


def key_of(value: Any) -> str:
    """Equal for values that JSON Schema calls equal: 1 and 1.0, but not 1 and true."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, list):
        return "[" + ",".join(key_of(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{json.dumps(key)}:{key_of(value[key])}" for key in sorted(value)) + "}"
    return json.dumps(value)


def _types(node: Schema) -> frozenset[str]:
    """Types that a value may have; an integer is a number."""
    values = _values(node)
    if values is not None:
        return frozenset(type_of(value) for value in values)
    said = node.get("type")
    if said is None:
        return _ALL
    names = said if isinstance(said, list) else [said]
    return frozenset("number" if name == "integer" else name for name in names)


def type_of(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    for kind, name in ((str, "string"), (dict, "object"), (list, "array")):
        if isinstance(value, kind):
            return name
    return "number"


def _least(node: Schema, key: str) -> float:
    return node.get(key, 0)


def _most(node: Schema, key: str) -> float:
    return node.get(key, float("inf"))


def _above(a: Schema, b: Schema) -> bool:
    """Whether every number of `a` is above every number of `b`."""
    low = max(a.get("minimum", -float("inf")), a.get("exclusiveMinimum", -float("inf")))
    high = min(b.get("maximum", float("inf")), b.get("exclusiveMaximum", float("inf")))
    open_end = "exclusiveMinimum" in a and a["exclusiveMinimum"] == low
    open_end = open_end or ("exclusiveMaximum" in b and b["exclusiveMaximum"] == high)
    return low > high or (low == high and open_end)


__all__ = ["close", "disjoint", "key_of", "settle", "type_of"]
