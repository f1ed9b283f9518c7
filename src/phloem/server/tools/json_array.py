"""What a model is made to write when a call is required and its own format cannot be forced: a JSON array of calls.

`[{"name": ..., "parameters": {...}}, ...]`, or one such object.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from phloem.server.tools._json import JsonReader

if TYPE_CHECKING:
    from phloem.server.tools._base import Steps


class Parser(JsonReader):
    begins = ()
    lead = "["

    def section(self, marker: str) -> Steps[None]:
        yield from self.skip("[")
        while True:
            yield from self.spaces()
            yield from self.named_object()
            if not (yield from self.optional(",")):
                break
        yield from self.optional("]")


def forced_schema(tools: dict[str, dict[str, Any]], parallel: bool) -> dict[str, Any]:
    """The JSON schema of such an array for these functions (name -> JSON schema of the arguments)."""
    shared: dict[str, Any] = {}
    items: list[dict[str, Any]] = []
    for name, parameters in tools.items():
        own = dict(parameters)
        for key in ("$defs", "definitions"):
            if isinstance(own.get(key), dict):
                shared.setdefault(key, {}).update(own.pop(key))
        items.append(
            {
                "type": "object",
                "properties": {"name": {"const": name}, "parameters": own},
                "required": ["name", "parameters"],
                "additionalProperties": False,
            }
        )
    item = items[0] if len(items) == 1 else {"anyOf": items}
    return {"type": "array", "minItems": 1, **({} if parallel else {"maxItems": 1}), "items": item, **shared}
