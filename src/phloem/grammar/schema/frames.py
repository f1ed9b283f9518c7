"""Schemas with values that the engine would change, written out: fixed texts in frames of objects, lists and choices.

The engine reads every number of a schema as a double. A grammar's fixed text has no such limit, so a constant stands as
its digits, what is around it as a frame, and everything else as schemas of their own.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, NoReturn

from phloem.grammar import _nodes
from phloem.grammar.schema.algebra import values_of
from phloem.grammar.schema.names import CONSTRAINING, Schema, children, fail, reachable, resolve
from phloem.grammar.schema.numbers import big_in

if TYPE_CHECKING:
    from phloem.grammar._nodes import Constraint

MAX_ITEMS = 64
_DEFINITIONS = ("$defs", "definitions")
_VALUE = frozenset({"const", "enum", "type", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "format"})
_OBJECT = frozenset({"type", "properties", "required", "additionalProperties", "minProperties", "maxProperties"})
_LIST = frozenset({"type", "items", "minItems", "maxItems"})


def spelled_out(root: Schema) -> Constraint | None:
    """The same with every constant as its digits; None where no value needs that.

    Raises:
        BadRequest: naming the path of a value that no frame leads to.
    """
    if all(not isinstance(node, dict) or big_in(node, path) is None for path, node in reachable(root)):
        return None
    return _Frames(root).of(root, "#", ())


class _Frames:
    def __init__(self, root: Schema) -> None:
        self.root = root

    def of(self, node: Any, path: str, inside: tuple[str, ...]) -> Constraint:
        """`inside`: references that lead here."""
        if not isinstance(node, dict) or not self._needs(node, path, set()):
            return _nodes.JsonSchema(self._alone(node, path))
        keys = {key for key in node if key in CONSTRAINING}
        if keys & {"const", "enum"} and keys <= _VALUE:
            found = values_of(node)
            return _nodes.Choice(tuple(map(_text, found))) if found else self._refuse(node, path)
        if keys == {"anyOf"}:
            parts = [self.of(item, f"{path}/anyOf/{at}", inside) for at, item in enumerate(node["anyOf"])]
            return _nodes.Union(tuple(parts))
        if keys == {"$ref"} and node["$ref"] not in inside:
            place, target = resolve(self.root, node["$ref"], path)
            return self.of(target, place, (*inside, node["$ref"]))
        if node.get("type") in ("object", ["object"]) and keys <= _OBJECT:
            return self._object(node, path, inside)
        if node.get("type") in ("array", ["array"]) and keys <= _LIST:
            return self._list(node, path, inside)
        return self._refuse(node, path)

    def _object(self, node: Schema, path: str, inside: tuple[str, ...]) -> Constraint:
        listed = node.get("properties", {})
        must = set(node.get("required", ()))
        counted = node.get("minProperties", 0) > len(must) or node.get("maxProperties", len(listed)) < len(listed)
        if node.get("additionalProperties", True) is not False or counted or not must <= set(listed):
            return self._refuse(node, path)
        parts: list[tuple[Constraint, bool]] = []
        for name, item in listed.items():
            if item is False and name not in must:
                continue
            value = self.of(item, f"{path}/properties/{name}", inside)
            parts.append((_nodes.Sequence((_fixed(f"{_text(name)}:"), value)), name in must))
        return _nodes.Sequence((_fixed("{"), _nodes.Members(tuple(parts), ","), _fixed("}")))

    def _list(self, node: Schema, path: str, inside: tuple[str, ...]) -> Constraint:
        item = self.of(node["items"], f"{path}/items", inside)
        least, most = int(node.get("minItems", 0)), node.get("maxItems")
        if max(least, most or 0) > MAX_ITEMS or (most is None and least > 1):
            return self._refuse(node, path)
        if most is None:
            body: Constraint = _nodes.Repeat(item, ",", empty=not least)
        else:
            body = _nodes.Members(tuple((item, at < least) for at in range(int(most))), ",")
        return _nodes.Sequence((_fixed("["), body, _fixed("]")))

    def _refuse(self, node: Schema, path: str) -> NoReturn:
        stack, seen = [(path, node)], set[int]()
        while stack:
            place, item = stack.pop()
            if not isinstance(item, dict) or id(item) in seen:
                continue
            seen.add(id(item))
            found = big_in(item, place)
            if found is not None:
                fail(found[0], f"{found[1][:60]} cannot be held exactly here, beside {_beside(node)} of {path}")
            stack += children(item, place)
            if isinstance(item.get("$ref"), str):
                stack.append(resolve(self.root, item["$ref"], place))
        fail(path, "no value is left")

    def _needs(self, node: Any, path: str, seen: set[int]) -> bool:
        if not isinstance(node, dict) or id(node) in seen:
            return False
        seen.add(id(node))
        below = list(children(node, path))
        if isinstance(node.get("$ref"), str):
            below.append(resolve(self.root, node["$ref"], path))
        return big_in(node, path) is not None or any(self._needs(item, place, seen) for place, item in below)

    def _alone(self, node: Any, path: str) -> str:
        """A part as a schema of its own; what it refers to must be among the definitions."""
        if not isinstance(node, dict):
            return json.dumps(node)
        shared = {key: self.root[key] for key in _DEFINITIONS if key in self.root}
        for place, item in reachable({**node, **shared}) if '"$ref"' in json.dumps(node) else ():
            target = item.get("$ref") if isinstance(item, dict) else None
            if isinstance(target, str) and not target.startswith(tuple(f"#/{key}/" for key in _DEFINITIONS)):
                fail(f"{path}{place[1:]}/$ref", "beside a number that cannot be held, references lead to $defs only")
        return json.dumps({**node, **shared}, ensure_ascii=False)


def _beside(node: Schema) -> str:
    return ", ".join(key for key in node if key in CONSTRAINING)


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _fixed(text: str) -> Constraint:
    """As a choice of one, in which names of special tokens are plain text."""
    return _nodes.Choice((text,))
