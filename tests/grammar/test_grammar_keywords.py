"""Conditions and other keywords that are rewritten: what is generated is valid, and nothing valid is lost."""

from __future__ import annotations

import itertools
import json
import time
import zlib
from typing import Any

import jsonschema
import pytest
from grammar_support import engine, walk
from hypothesis import given, settings
from hypothesis import strategies as st

from phloem.core.errors import BadRequest
from phloem.grammar._base import JsonSchema
from phloem.grammar.schema import algebra as _algebra

WALKS = 16
SHORT = {"type": "string", "maxLength": 6}
ADDRESS = {
    "type": "object",
    "properties": {"country": {"enum": ["us", "nl", "de"]}, "zip": SHORT, "state": SHORT},
    "required": ["country", "zip"],
}
US = {"properties": {"country": {"const": "us"}}, "required": ["country"]}
NL = {"properties": {"country": {"const": "nl"}}, "required": ["country"]}
LIST = {"type": "array", "maxItems": 4}

# name -> schema, values that it admits (in the schema's order of properties), values that it does not.
CASES: dict[str, tuple[dict[str, Any], list[Any], list[Any]]] = {
    # not
    "not a type": ({"type": ["string", "integer", "null"], "not": {"type": "string"}}, [1, None], ["a", 1.5]),
    "not several types": ({"not": {"type": ["number", "object", "array"]}}, ["a", None, True], [1, 1.5, {}, []]),
    "not an integer": ({"type": ["integer", "null"], "not": {"type": "integer"}}, [None], [3]),
    "not a text": (
        {"type": "string", "maxLength": 6, "not": {"const": "admin"}},
        ["", "a", "adm", "admi", "admins", "x"],
        ["admin"],
    ),
    "not of texts": (
        {"type": "string", "maxLength": 5, "not": {"enum": ["", "no", "now", "n-]", 3]}},
        ["n", "nox", "nows", "yes", "n-", "-]"],
        ["", "no", "now", "n-]"],
    ),
    "not an enum of an enum": ({"enum": ["a", 1, None, 2], "not": {"enum": [1.0, "a"]}}, [None, 2], ["a", 1]),
    "not a boolean": ({"type": "boolean", "not": {"const": True}}, [False], [True]),
    "not a number": (
        {"type": "integer", "minimum": 0, "maximum": 9, "not": {"enum": [0, 4, 5]}},
        [1, 3, 6, 9],
        [0, 4, 5],
    ),
    "not a short text": ({"type": "string", "maxLength": 5, "not": {"maxLength": 2}}, ["abc"], ["", "ab"]),
    "not a range": (
        {"type": "number", "minimum": 0, "maximum": 9, "not": {"minimum": 2, "maximum": 5}},
        [1, 6.5],
        [2, 3, 5],
    ),
    "not empty": ({**LIST, "items": {"type": "null"}, "not": {"maxItems": 0}}, [[None]], [[]]),
    "not both": (
        {"type": "object", "properties": {"a": SHORT, "b": SHORT}, "not": {"required": ["a", "b"]}},
        [{}, {"a": ""}, {"b": "x"}],
        [{"a": "", "b": ""}],
    ),
    "not a member": (
        {
            "type": "object",
            "properties": {"a": {"enum": ["x", "y"]}},
            "not": {"properties": {"a": {"const": "x"}}, "required": ["a"]},
        },
        [{}, {"a": "y"}],
        [{"a": "x"}],
    ),
    "not any of": (
        {"type": ["integer", "string", "boolean"], "not": {"anyOf": [{"type": "string"}, {"minimum": 3}]}},
        [1],
        [3, "a", True],
    ),
    "not not": ({"type": ["integer", "string"], "not": {"not": {"type": "string"}}}, ["a"], [1]),
    "not nothing": ({"type": "null", "not": False}, [None], [1]),
    "not in a reference": (
        {
            "$defs": {"word": {"type": "string", "maxLength": 3, "not": {"const": "no"}}},
            "type": "array",
            "maxItems": 2,
            "items": {"$ref": "#/$defs/word"},
        },
        [["yes"], []],
        [["no"], ["a", "no"]],
    ),
    "not a reference": (
        {"$defs": {"s": {"type": "string"}}, "type": ["null", "string"], "not": {"$ref": "#/$defs/s"}},
        [None],
        ["a"],
    ),
    # if
    "if then else": (
        {**ADDRESS, "if": US, "then": {"required": ["state"]}, "else": {"properties": {"state": False}}},
        [{"country": "us", "zip": "1", "state": "NY"}, {"country": "de", "zip": "1"}],
        [{"country": "us", "zip": "1"}, {"country": "nl", "zip": "1", "state": "x"}],
    ),
    "several ifs": (
        {
            **ADDRESS,
            "allOf": [
                {"if": US, "then": {"properties": {"zip": {"pattern": "^[0-9]{5}$"}}}},
                {"if": NL, "then": {"properties": {"zip": {"pattern": "^[0-9]{4}[A-Z]{2}$"}}}},
            ],
        },
        [{"country": "us", "zip": "12345"}, {"country": "nl", "zip": "1234AB"}, {"country": "de", "zip": ""}],
        [{"country": "us", "zip": "1234AB"}, {"country": "nl", "zip": "12345"}],
    ),
    "if without then": ({"type": "integer", "if": {"minimum": 5}, "maximum": 9}, [3, 7], [10]),
    "then without if": ({"type": "integer", "then": {"minimum": 5}, "maximum": 9}, [3], [10]),
    "if a number": (
        {"type": "integer", "if": {"minimum": 0}, "then": {"maximum": 5}, "else": {"minimum": -3}},
        [0, 5, -3],
        [6, -4],
    ),
    "if present": (
        {
            "type": "object",
            "properties": {"card": SHORT, "code": SHORT},
            "if": {"required": ["card"]},
            "then": {"required": ["code"]},
        },
        [{}, {"code": ""}, {"card": "", "code": ""}],
        [{"card": ""}],
    ),
    "if in a list": (
        {
            "type": "array",
            "maxItems": 2,
            "items": {
                "type": "object",
                "properties": {"kind": {"enum": ["a", "b"]}, "n": {"type": "integer"}},
                "required": ["kind"],
                "if": {"properties": {"kind": {"const": "a"}}},
                "then": {"required": ["n"]},
            },
        },
        [[{"kind": "b"}, {"kind": "a", "n": 1}]],
        [[{"kind": "a"}]],
    ),
    "if in an if": (
        {
            "type": "integer",
            "minimum": 0,
            "maximum": 30,
            "if": {"minimum": 10},
            "then": {"if": {"minimum": 20}, "then": {"multipleOf": 10}},
        },
        [3, 15, 20, 30],
        [21],
    ),
    # dependencies
    "dependent required": (
        {"type": "object", "properties": {"a": SHORT, "b": SHORT}, "dependentRequired": {"a": ["b"]}},
        [{}, {"b": ""}, {"a": "", "b": ""}],
        [{"a": ""}],
    ),
    "dependent schemas": (
        {
            "type": "object",
            "properties": {"a": SHORT, "n": {"type": "integer"}},
            "dependentSchemas": {"a": {"properties": {"n": {"minimum": 5}}}},
        },
        [{}, {"n": 1}, {"a": "", "n": 5}],
        [{"a": "", "n": 1}],
    ),
    "old dependencies": (
        {
            "$schema": "http://json-schema.org/draft-07/schema#",
            "type": "object",
            "properties": {"a": SHORT, "b": SHORT},
            "dependencies": {"a": ["b"]},
        },
        [{}, {"a": "", "b": ""}],
        [{"a": ""}],
    ),
    # propertyNames
    "names of an enum": (
        {"type": "object", "propertyNames": {"enum": ["x", "y"]}, "additionalProperties": {"type": "integer"}},
        [{}, {"x": 1}, {"x": 1, "y": 2}],
        [{"z": 1}, {"x": "a"}],
    ),
    "names of an enum beside properties": (
        {"type": "object", "properties": {"a": SHORT, "b": SHORT}, "propertyNames": {"enum": ["a", "c"]}},
        [{}, {"a": "", "c": None}],
        [{"b": ""}],
    ),
    "names by pattern": (
        {
            "type": "object",
            "propertyNames": {"pattern": "^[a-z]{1,3}$"},
            "additionalProperties": {"type": "null"},
            "maxProperties": 2,
        },
        [{}, {"a": None}, {"ab": None, "b": None}],
        [{"A": None}, {"abcd": None}, {"a": 1}],
    ),
    "names by length": (
        {
            "type": "object",
            "propertyNames": {"minLength": 2, "maxLength": 3},
            "additionalProperties": {"type": "null"},
            "maxProperties": 2,
        },
        [{}, {"ab": None}],
        [{"a": None}, {"abcd": None}],
    ),
    "no names": ({"type": "object", "propertyNames": False}, [{}], [{"a": 1}]),
    "all names": (
        {"type": "object", "propertyNames": {"type": "string"}, "properties": {"a": SHORT}},
        [{}, {"a": ""}],
        [{"a": 1}],
    ),
    # contains
    "contains": (
        {**LIST, "items": {"type": ["integer", "null"]}, "contains": {"type": "integer"}},
        [[1], [None, 1], [None, None, None, 2], [1, 1]],
        [[], [None], [None, None, None, None]],
    ),
    "contains a member": (
        {
            "type": "array",
            "maxItems": 3,
            "items": {"type": "object", "properties": {"k": {"enum": ["a", "b"]}}, "required": ["k"]},
            "contains": {"properties": {"k": {"const": "a"}}},
        },
        [[{"k": "a"}], [{"k": "b"}, {"k": "a"}]],
        [[], [{"k": "b"}]],
    ),
    "contains anywhere": (
        {"type": "array", "items": {"enum": [1, 2]}, "contains": {"const": 2}},
        [[2], [1, 1, 2, 1]],
        [[], [1, 1]],
    ),
    "contains none": (
        {**LIST, "items": {"type": "null"}, "contains": {"type": "integer"}, "minContains": 0},
        [[], [None]],
        [[1]],
    ),
    "contains any": (
        {**LIST, "items": {"type": "null"}, "contains": {}, "minContains": 2, "maxContains": 3},
        [[None, None]],
        [[None], [None] * 4],
    ),
    "contains its items": ({**LIST, "items": {"type": "null"}, "contains": {"type": "null"}}, [[None]], [[]]),
    # uniqueItems
    "not unique": ({**LIST, "items": {"type": "null"}, "uniqueItems": False}, [[None, None]], [[1]]),
    "unique of an enum": (
        {"type": "array", "items": {"enum": ["a", "b", 1]}, "uniqueItems": True, "minItems": 1},
        [["a"], ["b", "a"], [1, "b", "a"]],
        [[], ["a", "a"], ["a", 1, "a"]],
    ),
    "unique of a reference": (
        {"$defs": {"c": {"enum": ["r", "g"]}}, "type": "array", "items": {"$ref": "#/$defs/c"}, "uniqueItems": True},
        [[], ["g", "r"]],
        [["g", "g"]],
    ),
    "unique booleans": ({"items": {"type": "boolean"}, "uniqueItems": True}, [[], [True, False]], [[True, True]]),
    "unique alone": ({"type": "array", "maxItems": 1, "items": SHORT, "uniqueItems": True}, [[], ["a"]], [["a", "a"]]),
    "unique by place": (
        {
            "type": "array",
            "prefixItems": [{"type": "integer"}, SHORT, {"type": "null"}],
            "items": False,
            "uniqueItems": True,
        },
        [[], [1, "a"], [1, "", None]],
        [["a", 1]],
    ),
}


def valid(value: Any, schema: Any) -> bool:
    kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    return kind(schema).is_valid(value)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_nothing_else_is_generated_and_nothing_is_lost(name: str) -> None:
    schema, good, bad = CASES[name]
    assert all(valid(value, schema) for value in good) and not any(valid(value, schema) for value in bad)
    compiled = engine("llguidance").compile(JsonSchema(json.dumps(schema)))
    encode = engine("llguidance").vocabulary.encode
    for value, wanted in [*((value, True) for value in good), *((value, False) for value in bad)]:
        ids = encode(json.dumps(value, separators=(",", ":"), ensure_ascii=False))
        matcher = compiled.matcher()
        whole = matcher.accept(ids) == len(ids) and matcher.may_end
        assert whole is wanted, value
    finished = 0
    for index in range(WALKS):
        _, text = walk(compiled.matcher(), seed=zlib.crc32(name.encode()) + index)
        if text is not None:
            assert valid(json.loads(text), schema), text
            finished += 1
    assert finished


@pytest.mark.parametrize(
    ("schema", "place"),
    [
        ({"not": {}}, "#/not: no value is left"),
        ({"type": "string", "not": {"type": "string"}}, "#/not: no value is left"),
        ({"not": {"type": "integer"}}, "#/not"),
        ({"type": "string", "not": {"pattern": "a"}}, "#/not"),
        ({"type": "object", "not": {"const": {}}}, "#/not"),
        ({"type": "array", "not": {"contains": {"type": "null"}}}, "#/not"),
        ({"items": {"type": "string", "if": {"format": "date"}, "then": {"minLength": 3}}}, "#/items/if"),
        ({"if": {"properties": {"a": {"multipleOf": 2}}}, "then": {"required": ["b"]}}, "#/then"),
        ({"allOf": [{"if": {"pattern": "a"}, "then": {"maxLength": 3}}]}, "#/allOf/0/if"),
        ({"properties": {"a": {"type": "null"}, "b": {"$ref": "#/properties/a"}}, "not": {"required": ["a"]}}, "#/not"),
        ({"type": "object", "propertyNames": {"pattern": "a", "maxLength": 3}}, "#/propertyNames"),
        ({"type": "object", "propertyNames": {"format": "uuid"}}, "#/propertyNames"),
        ({"type": "object", "patternProperties": {"^a": {}}, "propertyNames": {"pattern": "b$"}}, "#/propertyNames"),
        (
            {"properties": {"a": {}}, "additionalProperties": {"type": "null"}, "propertyNames": {"pattern": "a"}},
            "#/propertyNames",
        ),
        ({"type": "array", "contains": {"type": "null"}, "minContains": 2}, "#/contains"),
        ({"type": "array", "contains": {"type": "null"}, "maxContains": 2}, "#/maxContains"),
        ({"contains": {"type": "null"}}, "#/contains"),
        ({"type": "array", "prefixItems": [{}], "contains": {"type": "null"}}, "#/contains"),
        ({"type": "array", "uniqueItems": True}, "#/uniqueItems"),
        ({"type": "array", "items": {"type": "string"}, "uniqueItems": True}, "#/uniqueItems"),
        ({"type": "array", "items": {"enum": list(range(9))}, "uniqueItems": True}, "#/uniqueItems"),
        (
            {"type": "array", "prefixItems": [{}, {"type": "null"}], "items": False, "uniqueItems": True},
            "#/uniqueItems",
        ),
        (
            # A narrowed branch could hide that another one holds as well.
            {"oneOf": [{"minLength": 1}, {"items": {"enum": [1]}, "uniqueItems": True}]},
            "#/oneOf/1/uniqueItems",
        ),
    ],
)
def test_what_cannot_be_exact_is_refused_by_place(schema: object, place: str) -> None:
    with pytest.raises(BadRequest) as caught:
        engine("llguidance").compile(JsonSchema(json.dumps(schema)))
    assert place in caught.value.message and caught.value.status == 400


@pytest.mark.slow
def test_conditions_that_multiply_end_in_an_error() -> None:
    def nested(depth: int) -> Any:
        inner = nested(depth - 1) if depth else {"type": "integer"}
        names = [f"{depth}{at}" for at in range(6)]
        required = {name: [other] for name, other in itertools.pairwise(names)}
        return {"type": "object", "properties": dict.fromkeys(names, inner), "dependentRequired": required}

    wide: Any = {"not": {"anyOf": [{"const": f"word {at}"} for at in range(5000)]}}
    started = time.perf_counter()
    for schema in (nested(3), wide, {"items": [wide] * 40}):
        with pytest.raises(BadRequest):
            engine("llguidance").compile(JsonSchema(json.dumps(schema)))
    assert time.perf_counter() - started < 20


# --- the algebra, judged by the library

SCALARS = [None, True, False, 0, 1, 2, 2.5, "", "a", "ab", "b"]
VALUES = [
    *SCALARS,
    [],
    [1],
    ["a", "b"],
    {},
    *({"k": value} for value in SCALARS),
    *({"k": first, "l": second} for first, second in itertools.product([1, "a", None], [0, "b"])),
    {"m": 1},
]
_leaf = st.one_of(
    st.sampled_from(["null", "boolean", "number", "string", "integer", "object", "array"]).map(lambda t: {"type": t}),
    st.lists(st.sampled_from(SCALARS), min_size=1, max_size=3).map(lambda values: {"enum": values}),
    st.sampled_from(SCALARS).map(lambda value: {"const": value}),
    st.sampled_from(["minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"]).map(lambda key: {key: 1}),
    st.sampled_from(["minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"]).map(
        lambda key: {key: 1}
    ),
    st.sampled_from([{}, True, False, {"required": ["k"]}, {"required": ["l", "k"]}]),
    st.sampled_from([{"type": ["string", "null"]}, {"type": ["integer", "object"]}]),
)


def _above(inner: Any) -> Any:
    some = st.lists(inner, min_size=1, max_size=2)
    names = st.dictionaries(st.sampled_from(["k", "l"]), inner, min_size=1)
    return st.one_of(
        inner.map(lambda item: {"not": item}),
        some.map(lambda items: {"anyOf": items}),
        some.map(lambda items: {"allOf": items}),
        names.map(lambda items: {"properties": items}),
        st.tuples(names, inner).map(lambda pair: {"properties": pair[0], "additionalProperties": pair[1]}),
        st.tuples(names, st.sampled_from([["k"], ["l"]])).map(lambda p: {"properties": p[0], "required": p[1]}),
        st.tuples(inner, inner).map(
            lambda pair: pair[0] | pair[1] if isinstance(pair[0], dict) and isinstance(pair[1], dict) else pair[0]
        ),
    )


SCHEMAS = st.recursive(_leaf, _above, max_leaves=5)


@pytest.mark.slow
@settings(max_examples=250, deadline=None)
@given(SCHEMAS, SCHEMAS)
def test_conjunction_and_difference_are_exact(a: Any, b: Any) -> None:
    together, left = _algebra.both(a, b), _algebra.without({}, a, b)
    for value in VALUES:
        first, second = valid(value, a), valid(value, b)
        assert valid(value, together) == (first and second), value
        if left is not None:
            assert any(valid(value, one) for one in left) == (first and not second), value


def test_false_and_zero_are_two_values_in_a_conjunction() -> None:
    for key in ("not", "items", "propertyNames"):
        a = {key: {"not": {"const": False}}} if key == "not" else {key: {"const": False}}
        b = {key: {"not": {"const": 0}}} if key == "not" else {key: {"const": 0}}
        together = _algebra.both(a, b)
        for value in [*VALUES, False, 0, [False], [0], [], {}]:
            assert valid(value, together) == (valid(value, a) and valid(value, b)), (key, value)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text("ab-]^\\n[", max_size=4), min_size=1, max_size=4), st.text("ab-]^\\n[", max_size=5))
def test_a_pattern_for_any_text_but_some(barred: list[str], text: str) -> None:
    import re

    found = re.search(_algebra.any_but(barred).replace("$", r"\Z"), text)
    assert (found is not None) == (text not in barred)
