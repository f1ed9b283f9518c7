"""Every text that a JSON grammar ends is valid under its schema, judged by the `jsonschema` library."""

from __future__ import annotations

import json
import zlib

import jsonschema
import pytest
from grammar_schemas import SCHEMAS
from grammar_support import engine, walk

from phloem.core.errors import BadRequest
from phloem.grammar._base import JsonObject, JsonSchema

WALKS = 20
CLOSED = {"type": "object", "additionalProperties": False}


def validate(text: str, schema: object) -> None:
    value = json.loads(text)
    if isinstance(schema, dict) and isinstance(schema.get("exclusiveMinimum"), bool):
        schema = {**schema, "$schema": "http://json-schema.org/draft-04/schema#"}
    kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    kind(schema, format_checker=kind.FORMAT_CHECKER).validate(value)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCHEMAS)
def test_what_ends_is_valid(name: str) -> None:
    compiled = engine("llguidance").compile(JsonSchema(json.dumps(SCHEMAS[name])))
    finished = 0
    for index in range(WALKS):
        _, text = walk(compiled.matcher(), seed=zlib.crc32(name.encode()) + index)
        if text is not None:
            validate(text, SCHEMAS[name])
            assert text == text.strip()
            finished += 1
    assert finished >= WALKS // 5, "walks must end, or nothing was tested"


def test_there_are_enough_schemas() -> None:
    assert len(SCHEMAS) >= 60


def test_any_object() -> None:
    compiled = engine("llguidance").compile(JsonObject())
    texts = [text for seed in range(8) if (text := walk(compiled.matcher(), seed)[1]) is not None]
    assert texts and all(isinstance(json.loads(text), dict) for text in texts)


def test_compact_by_default_and_bounded_when_flexible() -> None:
    schema = JsonSchema(json.dumps({"type": "object", "properties": {"a": {"type": "null"}}, "required": ["a"]}))
    encode = engine("llguidance").vocabulary.encode
    assert engine("llguidance").compile(schema).matcher().accept(encode('{"')) == 1
    assert engine("llguidance").compile(schema).matcher().accept(encode("{ ")) == 1, "only the bracket"
    loose = engine("llguidance", "flexible").compile(schema).matcher()
    ids = encode('{\n  "a" : null\n}')
    assert loose.accept(ids) == len(ids) and loose.may_end
    blanks = encode("{" + " " * 60)
    fresh = engine("llguidance", "flexible").compile(schema).matcher()
    taken = fresh.accept(blanks)
    assert taken < len(blanks), "blanks must not go on without end"


@pytest.mark.parametrize(
    ("schema", "place", "word"),
    [
        ({"not": {"pattern": "a"}}, "#/not", "not supported"),
        ({"properties": {"a": {"uniqueItems": True}}}, "#/properties/a/uniqueItems", "not supported"),
        ({"items": {"if": {"pattern": "a"}, "then": False}}, "#/items/if", "not supported"),
        ({"$defs": {"x": {"contains": {"type": "null"}}}, "$ref": "#/$defs/x"}, "#/$defs/x/contains", "not supported"),
        ({"propertyNames": {"format": "uuid"}}, "#/propertyNames", "not supported"),
        ({"unevaluatedProperties": False}, "#/unevaluatedProperties", "not supported"),
        ({"type": "string", "format": "idn-email"}, "#/format", "idn-email"),
        ({"type": "string", "format": "made-up"}, "#/format", "made-up"),
        ({"type": "wat"}, "#/type", "wat"),
        ({"type": []}, "#/type", "no type"),
        ({"properties": {"a": {"minLength": -1}}}, "#/properties/a/minLength", "-1"),
        ({"properties": {"a": {"maxLength": "x"}}}, "#/properties/a/maxLength", "whole number"),
        ({"required": "a"}, "#/required", "list of texts"),
        ({"properties": []}, "#/properties", "object of schemas"),
        ({"properties": {"a/b": 5}}, "#/properties/a~1b", "object or a boolean"),
        ({"enum": []}, "#/enum", "at least one"),
        ({"multipleOf": 0}, "#/multipleOf", "above 0"),
        ({"properties": {"x": {"$ref": "#/$defs/nope"}}}, "#/properties/x/$ref", "points to nothing"),
        ({"items": {"$ref": "https://example.com/x"}}, "#/items/$ref", "not inside"),
        ({"$ref": "#"}, "#/$ref", "without end"),
        (
            {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
            "/$ref",
            "without end",
        ),
        ({"properties": {"a": {"type": "string", "pattern": "("}}}, "#/properties/a", "unclosed group"),
        ({"items": {"type": "string", "pattern": "(?=a)b"}}, "#/items", "look-ahead"),
        ({"type": "integer", "minimum": 5, "maximum": 2}, "#", "minimum (5)"),
        (
            {"properties": {"a": {"type": "array", "minItems": 5, "maxItems": 2}}},
            "#/properties/a",
            "minItems (5)",
        ),
        (
            {"required": ["a"], "type": "object", "properties": {"a": {"required": ["z"], **CLOSED}}},
            "#",
            "unsatisfiable",
        ),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "#", "oneOf"),
        ({"properties": {"a": {"oneOf": [{"minLength": 1}, {"type": "string"}]}}}, "#/properties/a", "oneOf"),
        ({"type": "object", "minProperties": 2}, "#/minProperties", "cannot be guaranteed"),
        ({"exclusiveMinimum": True}, "#/exclusiveMinimum", "needs"),
    ],
)
def test_refusals_name_the_place(schema: object, place: str, word: str) -> None:
    with pytest.raises(BadRequest) as caught:
        engine("llguidance").compile(JsonSchema(json.dumps(schema)))
    assert place in caught.value.message and word in caught.value.message
    assert caught.value.status == 400


@pytest.mark.parametrize(
    ("text", "word"),
    [("{bad", "line 1"), ("[1]", "object or a boolean"), ("false", "admits nothing"), ('{"minimum": NaN}', "NaN")],
)
def test_what_is_no_schema(text: str, word: str) -> None:
    with pytest.raises(BadRequest, match=word):
        engine("llguidance").compile(JsonSchema(text))


def test_the_schema_true_admits_any_json() -> None:
    matcher = engine("llguidance").compile(JsonSchema("true")).matcher()
    ids = engine("llguidance").vocabulary.encode('[1,{"a":null}]')
    assert matcher.accept(ids) == len(ids) and matcher.may_end


def test_nesting_and_size_are_limited() -> None:
    deep = '{"items":' * 500 + "{}" + "}" * 500
    with pytest.raises(BadRequest, match="nested"):
        engine("llguidance").compile(JsonSchema(deep))
    wide = json.dumps({"enum": list(range(100_000))})
    with pytest.raises(BadRequest, match="more than"):
        engine("llguidance").compile(JsonSchema(wide))


def accepts(schema: object, text: str) -> bool:
    matcher = engine("llguidance").compile(JsonSchema(json.dumps(schema))).matcher()
    ids = engine("llguidance").vocabulary.encode(text)
    return matcher.accept(ids) == len(ids) and matcher.may_end


def test_objects_that_list_properties_are_closed_but_only_where_that_is_safe() -> None:
    plain = {"type": "object", "properties": {"a": {"type": "integer"}}}
    assert accepts(plain, '{"a":1}') and not accepts(plain, '{"a":1,"z":1}')
    assert accepts({**plain, "additionalProperties": True}, '{"a":1,"z":1}')
    both = {"allOf": [plain, {"type": "object", "properties": {"b": {"type": "null"}}, "required": ["b"]}]}
    assert accepts(both, '{"a":1,"b":null}')
    through = {"$defs": {"p": plain}, "$ref": "#/$defs/p", "properties": {"b": {"type": "null"}}}
    assert accepts(through, '{"b":null,"a":1}') or accepts(through, '{"a":1,"b":null}')


def test_a_branch_of_one_of_is_not_taken_for_another() -> None:
    """Closing both branches would make them look exclusive: `{"a":1}` is valid under the open second as well."""
    schema = {
        "oneOf": [
            {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
            {"type": "object", "properties": {"b": {"type": "integer"}}},
        ]
    }
    with pytest.raises(BadRequest, match="oneOf"):
        accepts(schema, '{"a":1}')
