"""What a model is made to write when a call is required and its own format cannot be forced: a JSON array of calls.

`[{"name": ..., "parameters": {...}}, ...]`, or one such object.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from phloem.text.tools._grammar import Shape, Unspeakable
from phloem.text.tools._json import MAX_DEPTH, JsonReader

if TYPE_CHECKING:
    from collections.abc import Iterable

    from phloem.text.tools._base import Steps

NAMES = ("xlam",)


class Parser(JsonReader):
    begins = ()
    lead = "["

    def structure(self, names: Iterable[str] | None = None, required: bool = False, parallel: bool = True) -> Shape:
        raise Unspeakable("a JSON array of calls is forced as a schema")

    def section(self, marker: str) -> Steps[None]:
        yield from self.named_objects()


def forced_schema(tools: dict[str, dict[str, Any]], parallel: bool) -> dict[str, Any]:
    """The JSON schema of such an array for these functions (name -> JSON schema of the arguments).

    A schema with references stands under `$defs` as a whole, its references pointing there.
    """
    shared: dict[str, Any] = {}
    items = [_item(name, parameters, shared) for name, parameters in tools.items()]
    item = items[0] if len(items) == 1 else {"anyOf": items}
    made: dict[str, Any] = {"type": "array", "minItems": 1, "items": item}
    if not parallel:
        made["maxItems"] = 1
    return made | ({"$defs": shared} if shared else {})


def one_call(name: str, parameters: dict[str, Any]) -> dict[str, Any]:
    """The JSON schema of one such object, standing alone."""
    shared: dict[str, Any] = {}
    item = _item(name, parameters, shared)
    return item | ({"$defs": shared} if shared else {})


def _item(name: str, parameters: dict[str, Any], shared: dict[str, Any]) -> dict[str, Any]:
    """`shared` gets what the object refers to."""
    own = parameters
    if _has_references(parameters, 0):
        shared[name] = _moved(parameters, f"#/$defs/{name}")
        own = {"$ref": f"#/$defs/{name}"}
    return {
        "type": "object",
        "properties": {"name": {"const": name}, "parameters": own},
        "required": ["name", "parameters"],
        "additionalProperties": False,
    }


def _has_references(schema: Any, depth: int) -> bool:
    if depth > MAX_DEPTH:
        return False
    values = schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ()
    return (isinstance(schema, dict) and isinstance(schema.get("$ref"), str)) or any(
        _has_references(value, depth + 1) for value in values
    )


def _moved(schema: Any, root: str) -> Any:
    """A schema whose references into itself begin at `root`."""
    if isinstance(schema, list):
        return [_moved(item, root) for item in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {key: _moved(value, root) for key, value in schema.items()}
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference.startswith("#"):
        moved["$ref"] = root + reference[1:]
    return moved
