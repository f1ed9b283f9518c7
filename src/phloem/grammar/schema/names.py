"""Reading a JSON schema before an engine does: limits, shapes, references, keywords; every complaint has a path.

What is checked follows JSON Schema 2020-12 and the older spellings that clients still send (draft 4 to 2019-09).
Names that no draft gives a meaning are annotations, as the specification has it; a keyword that constrains and that
an engine does not enforce is refused by name, never ignored.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, NoReturn
from urllib.parse import unquote

from phloem.core.errors import BadRequest
from phloem.grammar.schema.numbers import Rounded, read_number, rounded_at

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MAX_DEPTH = 64
MAX_NODES = 20_000

Schema = dict[str, Any]

# Where subschemas stand.
_ONE = (
    *("additionalProperties", "additionalItems", "items", "contains", "not", "if", "then", "else", "propertyNames"),
    *("unevaluatedItems", "unevaluatedProperties", "contentSchema"),
)
_MANY = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
_NAMED = ("properties", "patternProperties", "dependentSchemas")

# Every keyword of any draft that restricts values.
CONSTRAINING = (
    frozenset((*_ONE, *_MANY, *_NAMED, "$ref", "$dynamicRef", "$recursiveRef", "type", "enum", "const", "multipleOf"))
    | {"maximum", "exclusiveMaximum", "minimum", "exclusiveMinimum", "maxLength", "minLength", "pattern", "maxItems"}
    | {"minItems", "uniqueItems", "maxContains", "minContains", "maxProperties", "minProperties", "required"}
    | {"dependentRequired", "dependencies", "format", "disallow", "extends", "divisibleBy"}
) - {"contentSchema"}

_TYPES = ("null", "boolean", "object", "array", "number", "string", "integer")
_COUNTS = tuple(f"{end}{what}" for end in ("min", "max") for what in ("Length", "Items", "Contains", "Properties"))
_NUMBERS = ("multipleOf", "maximum", "minimum")
_VALUED = frozenset((*_COUNTS, *_NUMBERS, "exclusiveMinimum", "exclusiveMaximum", "const", "enum"))

# Formats of OpenAPI and pydantic that say how a value is meant, not how it is written.
ANNOTATION_FORMATS = frozenset(
    {"int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float", "double", "decimal"}
    | {"int", "uint", "int128", "uint128", "char"}
    | {"password", "binary", "byte", "path", "file-path", "directory-path", "json-string", "base64", "base64url"}
    | {"textarea", "color", "markdown", "html", "multi-line"}
)


def fail(path: str, reason: str) -> NoReturn:
    raise BadRequest(f"{path or '#'}: {reason}")


def _not_json(token: str) -> NoReturn:
    raise BadRequest(f"{token} is not JSON")


def read_json(text: str) -> Any:
    """Parse JSON, without NaN and Infinity. What means an integer is one; see `numbers.Rounded` for long fractions.

    Raises:
        BadRequest: with line and column.
    """
    try:
        return json.loads(text, parse_constant=_not_json, parse_float=read_number)
    except json.JSONDecodeError as error:
        raise BadRequest(f"not valid JSON: {error.msg} at line {error.lineno} column {error.colno}") from None
    except (RecursionError, ValueError) as error:
        raise BadRequest(f"not usable JSON: {error}") from None


def write_json(schema: Any, path: str) -> str:
    """A schema that was read as a part of something else, as its text.

    Raises:
        BadRequest: for a number that was rounded when it was read, where it restricts values.
    """
    if isinstance(schema, dict) and rounded_at(schema, path) is not None:
        for place, node in reachable(schema):
            for key in node if isinstance(node, dict) else ():
                found = rounded_at(node[key], f"{path}{place[1:]}/{key}") if key in _VALUED else None
                if found is not None:
                    fail(found[0], f"{found[1][:60]} cannot be held exactly as a number")
    return json.dumps(schema, ensure_ascii=False)


def read_schema(text: str) -> Schema:
    """Parse and check a schema; the answer is plain: `true` is `{}`, draft-4 bounds are numbers.

    Raises:
        BadRequest: naming the path inside the schema.
    """
    body = read_json(text)
    if body is True:
        return {}
    if body is False:
        fail("#", "the schema false admits nothing")
    if not isinstance(body, dict):
        fail("#", f"a schema is an object or a boolean, got {type(body).__name__}")
    _check_size(body)
    checker = _Checker(body)
    checker.run()
    return body


def _check_size(body: Any) -> None:
    """Bound depth and size without recursion."""
    stack: list[tuple[Any, int]] = [(body, 0)]
    nodes = 0
    while stack:
        item, depth = stack.pop()
        nodes += 1
        if depth > MAX_DEPTH * 2:
            raise BadRequest(f"the schema is nested deeper than {MAX_DEPTH * 2} levels")
        if nodes > MAX_NODES * 4:
            raise BadRequest(f"the schema has more than {MAX_NODES * 4} values")
        if isinstance(item, dict):
            stack.extend((value, depth + 1) for value in item.values())
        elif isinstance(item, list):
            stack.extend((value, depth + 1) for value in item)


def escape(key: str) -> str:
    """A key as one step of a JSON pointer."""
    return key.replace("~", "~0").replace("/", "~1")


def children(schema: Schema, path: str) -> Iterator[tuple[str, Any]]:
    """(path, subschema) of every direct subschema, definitions left out."""
    for key in _ONE:
        if isinstance(schema.get(key), (dict, bool)):
            yield f"{path}/{key}", schema[key]
    for key in _MANY:
        if isinstance(schema.get(key), list):
            for index, item in enumerate(schema[key]):
                yield f"{path}/{key}/{index}", item
    for key in _NAMED:
        if isinstance(schema.get(key), dict):
            for name, item in schema[key].items():
                yield f"{path}/{key}/{escape(name)}", item


def resolve(root: Schema, ref: str, path: str) -> tuple[str, Any]:
    """(path, subschema) that a local `$ref` names."""
    base = root.get("$id", root.get("id"))
    if isinstance(base, str) and base and ref.startswith(base.rstrip("#")):
        ref = "#" + ref[len(base.rstrip("#")) :].lstrip("#")
    if not ref.startswith("#"):
        fail(f"{path}/$ref", f"{ref!r} is not inside this schema; only local references are followed")
    pointer = unquote(ref[1:])
    if pointer and not pointer.startswith("/"):
        return _find_anchor(root, pointer, path)
    node: Any = root
    for step in pointer.split("/")[1:]:
        step = step.replace("~1", "/").replace("~0", "~")
        if isinstance(node, dict) and step in node:
            node = node[step]
        elif isinstance(node, list) and step.isdigit() and int(step) < len(node):
            node = node[int(step)]
        else:
            fail(f"{path}/$ref", f"{ref!r} points to nothing")
    return "#" + pointer, node


def _find_anchor(root: Schema, name: str, path: str) -> tuple[str, Any]:
    stack: list[tuple[str, Any]] = [("#", root)]
    while stack:
        place, node = stack.pop()
        if not isinstance(node, dict):
            continue
        if node.get("$anchor") == name or node.get("$dynamicAnchor") == name:
            return place, node
        stack.extend(children(node, place))
        for holder in ("$defs", "definitions"):
            if isinstance(node.get(holder), dict):
                stack.extend((f"{place}/{holder}/{escape(key)}", item) for key, item in node[holder].items())
    fail(f"{path}/$ref", f"there is no $anchor {name!r}")


def reachable(root: Schema) -> Iterator[tuple[str, Any]]:
    """(path, subschema) of everything that can matter: from the root, through references."""
    seen: set[str] = set()
    stack: list[tuple[str, Any]] = [("#", root)]
    while stack:
        path, node = stack.pop()
        if path in seen:
            continue
        seen.add(path)
        if len(seen) > MAX_NODES:
            raise BadRequest(f"the schema has more than {MAX_NODES} subschemas")
        yield path, node
        if isinstance(node, dict):
            stack.extend(children(node, path))
            if isinstance(node.get("$ref"), str):
                stack.append(resolve(root, node["$ref"], path))


class _Checker:
    """Shapes of the values of every reachable keyword."""

    def __init__(self, root: Schema) -> None:
        self.root = root

    def run(self) -> None:
        for path, node in reachable(self.root):
            if isinstance(node, bool):
                continue
            if not isinstance(node, dict):
                fail(path, f"a schema is an object or a boolean, got {type(node).__name__}")
            for key in node:
                check = _SHAPES.get(key)
                if check is not None:
                    check(node[key], f"{path}/{key}")
            _plain_bounds(node, path)
            _ordered_bounds(node, path)
            self._no_loop(path, node)

    def _no_loop(self, path: str, node: Schema) -> None:
        """`{"$ref": "#"}` and the like say nothing: no finite reading exists."""
        seen = {path}
        current, place = node, path
        while isinstance(current, dict) and isinstance(current.get("$ref"), str):
            place, current = resolve(self.root, current["$ref"], place)
            if place in seen:
                fail(f"{path}/$ref", "refers to itself without end")
            seen.add(place)


def _plain_bounds(node: Schema, path: str) -> None:
    """Draft 4 wrote `exclusiveMinimum: true` beside `minimum`."""
    for bound, exclusive in (("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")):
        value = node.get(exclusive)
        if isinstance(value, bool):
            if value and bound not in node:
                fail(f"{path}/{exclusive}", f"true needs `{bound}` beside it")
            del node[exclusive]
            if value:
                node[exclusive] = node.pop(bound)


def _ordered_bounds(node: Schema, path: str) -> None:
    for what in ("Length", "Items", "Properties", "imum"):
        low, high = node.get(f"min{what}"), node.get(f"max{what}")
        if low is not None and high is not None and low > high:
            fail(path, f"min{what} ({low}) is above max{what} ({high}): nothing is valid")


def _count(value: Any, path: str) -> None:
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    if isinstance(value, (bool, Rounded)) or not whole or value < 0:
        fail(path, f"expected a whole number of at least 0, got {json.dumps(value)[:60]}")


def _number(value: Any, path: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        fail(path, f"expected a number, got {json.dumps(value)[:60]}")
    _exact(value, path)
    if path.endswith("/multipleOf") and value <= 0:
        fail(path, "must be above 0")


def _exact(value: Any, path: str) -> None:
    found = rounded_at(value, path)
    if found is not None:
        fail(found[0], f"{found[1][:60]} cannot be held exactly as a number")


def _bound(value: Any, path: str) -> None:
    if not isinstance(value, bool):
        _number(value, path)


def _type(value: Any, path: str) -> None:
    names = value if isinstance(value, list) else [value]
    if not names:
        fail(path, "no type at all admits nothing")
    for name in names:
        if name not in _TYPES:
            fail(path, f"{json.dumps(name)[:60]} is not a type; known: {', '.join(_TYPES)}")


def _strings(value: Any, path: str) -> None:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        fail(path, "expected a list of texts")


def _string(value: Any, path: str) -> None:
    if not isinstance(value, str):
        fail(path, f"expected a text, got {json.dumps(value)[:60]}")


def _schemas(value: Any, path: str) -> None:
    if not isinstance(value, list) or not value:
        fail(path, "expected a list with at least one schema")


def _named(value: Any, path: str) -> None:
    if not isinstance(value, dict):
        fail(path, "expected an object of schemas")


def _subschema(value: Any, path: str) -> None:
    if not isinstance(value, (dict, bool)) and not (path.endswith("/items") and isinstance(value, list)):
        fail(path, f"a schema is an object or a boolean, got {json.dumps(value)[:60]}")


def _enum(value: Any, path: str) -> None:
    if not isinstance(value, list) or not value:
        fail(path, "expected a list with at least one value")
    _exact(value, path)


_SHAPES: dict[str, Callable[[Any, str], None]] = {
    **dict.fromkeys(_COUNTS, _count),
    **dict.fromkeys(_NUMBERS, _number),
    **dict.fromkeys(("exclusiveMinimum", "exclusiveMaximum"), _bound),
    **dict.fromkeys(("$ref", "pattern", "format", "$dynamicRef"), _string),
    **dict.fromkeys(("allOf", "anyOf", "oneOf", "prefixItems"), _schemas),
    **dict.fromkeys((*_NAMED, "$defs", "definitions"), _named),
    **dict.fromkeys(_ONE, _subschema),
    "type": _type,
    "required": _strings,
    "enum": _enum,
    "const": _exact,
}


def refuse_unsupported(root: Schema, supported: frozenset[str], formats: frozenset[str], engine: str) -> None:
    """Name every keyword and format that an engine does not enforce.

    Raises:
        BadRequest: listing up to eight of them with their paths.
    """
    found: list[str] = []
    for path, node in reachable(root):
        if not isinstance(node, dict):
            continue
        found += [f"{path}/{key}" for key in node if key in CONSTRAINING and key not in supported]
        if node.get("uniqueItems") is False and "uniqueItems" not in supported:
            found.remove(f"{path}/uniqueItems")
        shape = node.get("format")
        if shape is not None and "format" in supported and shape not in formats | ANNOTATION_FORMATS:
            found.append(f"{path}/format ({shape!r})")
    if found:
        more = f" and {len(found) - 8} more" if len(found) > 8 else ""
        raise BadRequest(f"not supported by the grammar engine {engine}: {', '.join(found[:8])}{more}")


def locate(root: Schema, complain: Callable[[Schema], str | None], message: str) -> str:
    """The path of the deepest subschema that an engine refuses with this message, by asking it about each alone."""
    best = "#"
    for count, (path, node) in enumerate(reachable(root)):
        if count > 500:
            break
        if isinstance(node, dict) and path.count("/") > best.count("/") and complain(_alone(root, path)) == message:
            best = path
    return best


def as_sent(text: str, message: str) -> str:
    """A complaint about a schema that was rewritten: its path, as far as the schema that the client sent has it."""
    path, colon, reason = message.partition(": ")
    if not colon or not path.startswith("#/") or " " in path:
        return message
    node, known = read_json(text), "#"
    for step in path[2:].split("/"):
        key = step.replace("~1", "/").replace("~0", "~")
        if isinstance(node, list) and key.isdecimal() and int(key) < len(node):
            node = node[int(key)]
        elif isinstance(node, dict) and key in node:
            node = node[key]
        else:
            break
        known += f"/{step}"
    return f"{known}: {reason}"


def _alone(root: Schema, path: str) -> Schema:
    """A schema that is the subschema at `path`, with everything it may refer to still at hand."""
    inner = json.loads(json.dumps(root))
    for _, node in reachable(root):
        if isinstance(node, dict) and isinstance(node.get("$ref"), str) and not node["$ref"].startswith(("#/", "#")):
            return root
    stack: list[Any] = [inner]
    while stack:
        item = stack.pop()
        if isinstance(item, dict):
            ref = item.get("$ref")
            if isinstance(ref, str) and (ref == "#" or ref.startswith("#/")):
                item["$ref"] = "#/$defs/root" + ref[1:]
            stack.extend(item.values())
        elif isinstance(item, list):
            stack.extend(item)
    for key in ("$id", "id", "$schema"):
        inner.pop(key, None)
    return {"$ref": "#/$defs/root" + path[1:], "$defs": {"root": inner}}
