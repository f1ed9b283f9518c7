"""The many spellings of a constraint, as one field of `SamplingParams`; what is plainly wrong is refused here.

Spellings: `response_format` (OpenAI), `json_schema`, `regex`, `ebnf`, `structural_tag` (SGLang), `guided_*` and
`structured_outputs` (vLLM), and all of these inside a literal `extra_body`. A schema always holds exactly: `strict`
true, false and absent mean the same here. JSON schemas travel as their text; choices as an equivalent pattern.
"""

from __future__ import annotations

from typing import Any

from phloem.core.errors import BadRequest
from phloem.core.request import SamplingParams
from phloem.grammar import _base
from phloem.grammar.schema import names as _schema
from phloem.grammar.schema.numbers import write_exact

FIELDS = ("json_schema", "regex", "ebnf", "structural_tag")
EARLY_CHECK = 32_768  # characters: longer schemas are checked off the event loop, by the engine

_GUIDED = {
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
    "guided_json_object": "json_object",
    "structural_tag": "structural_tag",
}
# Of vLLM's `structured_outputs`: what asks for nothing else than what holds here anyway, by its harmless values.
_HINTS: dict[str, tuple[Any, ...]] = {
    "disable_any_whitespace": (True, False),
    "disable_additional_properties": (True, False),
    "disable_fallback": (True, False),
    "whitespace_pattern": (),
}
_OBJECT = '{"type":"object"}'


def constraint_fields(body: Any) -> dict[str, str]:
    """The constraint that a request body asks for, as at most one field of `SamplingParams`, and `constraint_name`
    where the body calls it otherwise.

    Reads those of the attributes named above that the body has; None, and an empty text, are unset.

    Raises:
        BadRequest: naming the field: a wrong shape, or two constraints at once.
    """
    found: list[tuple[str, str, str]] = []
    sources: list[dict[str, Any]] = [{name: getattr(body, name, None) for name in _TOP}]
    extra = getattr(body, "extra_body", None)
    if extra is not None:
        for name in extra:
            if name not in _TOP:
                raise BadRequest(f"unknown field 'extra_body.{name}'", param=f"extra_body.{name}", code="unknown_field")
        sources.append(extra)
    for source in sources:
        for name in _TOP:
            value = source.get(name)
            if value is None or value == "" or (value == {} and name != "guided_json"):
                continue
            if name == "response_format":
                found += _response_format(value)
            elif name == "structured_outputs":
                found += _structured_outputs(value)
            elif name in FIELDS:
                found.append((name, _text(name, value, name), name))
            else:
                found += _guided(_GUIDED[name], value, name)
    if len(found) > 1:
        names = " and ".join(spelling for _, _, spelling in found)
        raise BadRequest(f"only one constraint at a time, got {names}", param=found[1][2])
    return {
        name: value
        for field, text, spelling in found
        for name, value in ((field, text), ("constraint_name", spelling))
        if name == field or spelling != field
    }


_TOP = ("response_format", *FIELDS, "structured_outputs", *(name for name in _GUIDED if name not in FIELDS))


def answer_shape(params: SamplingParams) -> dict[str, Any] | None:
    """The constraint as a part of a structural tag; None without one, and for structural tags: they may be of calls.

    Schemas go in as their text, so that no number in them is read and written again.
    """
    if params.json_schema is not None:
        return {"type": "json_schema", "json_schema": params.json_schema}
    if params.regex is not None:
        return {"type": "regex", "pattern": params.regex}
    return {"type": "ebnf", "grammar": params.ebnf} if params.ebnf is not None else None


def check(params: SamplingParams) -> None:
    """Refuse before submission what can be seen to be wrong at little cost; the engine finds the rest.

    Raises:
        BadRequest: with the reason and the place in the schema.
    """
    constraint = _base.constraint_of(params)
    if isinstance(constraint, _base.JsonSchema) and len(constraint.schema) <= EARLY_CHECK:
        try:
            _schema.read_schema(constraint.schema)
        except BadRequest as error:
            shown = _base.name_of(params)
            raise BadRequest(f"{shown}: {error.message}", param=shown) from None


def _response_format(value: Any) -> list[tuple[str, str, str]]:
    where = "response_format"
    if not isinstance(value, dict) or not isinstance(value.get("type"), str):
        raise BadRequest("response_format is an object with a `type`", param=where)
    kind = value["type"]
    if kind == "text":
        return []
    if kind == "json_object":
        schema = value.get("schema")  # some servers take one here
        return [("json_schema", _OBJECT if schema is None else _text("json_schema", schema, where), where)]
    if kind == "json_schema":
        inner = value.get("json_schema")
        # The Responses API writes name and schema beside the type.
        holder = inner if isinstance(inner, dict) else value
        schema = holder.get("schema", holder.get("schema_"))
        if schema is None:
            raise BadRequest("response_format.json_schema needs a `schema`", param=f"{where}.json_schema.schema")
        return [("json_schema", _text("json_schema", schema, f"{where}.json_schema.schema"), where)]
    if kind == "structural_tag":
        body = {name: item for name, item in value.items() if item is not None}
        return [("structural_tag", write_exact(body), where)]
    if kind in ("regex", "grammar", "ebnf"):
        text = value.get("pattern", value.get(kind, value.get("grammar")))
        return [("regex" if kind == "regex" else "ebnf", _text("regex", text, where), where)]
    known = "text, json_object, json_schema, structural_tag, regex, grammar"
    raise BadRequest(f"response_format: unknown type {kind!r:.100}; known: {known}", param=f"{where}.type")


def _structured_outputs(value: Any) -> list[tuple[str, str, str]]:
    where = "structured_outputs"
    if not isinstance(value, dict):
        raise BadRequest("structured_outputs is an object", param=where)
    found: list[tuple[str, str, str]] = []
    for name, item in value.items():
        if item is None or name.startswith("_"):
            continue
        if name in _HINTS:
            if not any(item is harmless for harmless in _HINTS[name]):
                raise BadRequest(f"not supported yet: {where}.{name}", param=f"{where}.{name}", code="not_supported")
            continue
        if name not in _GUIDED.values():
            known = ", ".join(sorted({*_GUIDED.values(), *_HINTS}))
            raise BadRequest(f"unknown field '{where}.{name}'; known: {known}", param=f"{where}.{name}")
        found += _guided(name, item, f"{where}.{name}")
    return found


def _guided(kind: str, value: Any, where: str) -> list[tuple[str, str, str]]:
    match kind:
        case "json":
            return [("json_schema", _text("json_schema", value, where), where)]
        case "regex":
            return [("regex", _text("regex", value, where), where)]
        case "grammar":
            return [("ebnf", _text("ebnf", value, where), where)]
        case "structural_tag":
            return [("structural_tag", _text("structural_tag", value, where), where)]
        case "json_object":
            return [("json_schema", _OBJECT, where)] if value else []
        case _:
            return [("regex", _choices(value, where), where)]


def _choices(value: Any, where: str) -> str:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise BadRequest(f"{where}: expected a list of texts", param=where)
    try:
        options = _base.choice(value).options
    except BadRequest as error:
        raise BadRequest(f"{where}: {error.message}", param=where) from None
    return "(" + "|".join(_escape(option) for option in options) + ")"


def _escape(text: str) -> str:
    return "".join(f"\\{char}" if char in r"\.+*?()|[]{}^$#&-~/" else char for char in text)


def _text(field: str, value: Any, where: str) -> str:
    """A schema or tag given as an object, or as its text; a pattern or grammar as text."""
    if isinstance(value, str):
        return value
    if field in ("json_schema", "structural_tag") and isinstance(value, (dict, bool)):
        return write_exact(value)
    shape = "an object or its text" if field in ("json_schema", "structural_tag") else "a text"
    raise BadRequest(f"{where}: expected {shape}, got {type(value).__name__}", param=where)
