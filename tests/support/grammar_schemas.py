"""Schemas over the keywords of the JSON Schema test suite that the default engine enforces. Name -> schema."""

from __future__ import annotations

from typing import Any

_NODE = {
    "type": "object",
    "properties": {"v": {"type": "integer"}, "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}},
    "required": ["v", "next"],
    "additionalProperties": False,
}
_SHORT = {"type": "string", "maxLength": 8}


def _object(**properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


SCHEMAS: dict[str, dict[str, Any]] = {
    # type
    "null": {"type": "null"},
    "boolean": {"type": "boolean"},
    "integer": {"type": "integer"},
    "number": {"type": "number"},
    "string": {"type": "string"},
    "several types": {"type": ["integer", "null", "boolean"]},
    "anything": {},
    # numbers
    "minimum": {"type": "integer", "minimum": 17},
    "maximum negative": {"type": "integer", "maximum": -3},
    "range": {"type": "integer", "minimum": -12, "maximum": 1234},
    "exclusive range": {"type": "integer", "exclusiveMinimum": 0, "exclusiveMaximum": 11},
    "number range": {"type": "number", "minimum": 0.5, "exclusiveMaximum": 1.25},
    "number below zero": {"type": "number", "exclusiveMaximum": 0, "minimum": -99.5},
    "multiple of three": {"type": "integer", "multipleOf": 3, "minimum": 1, "maximum": 500},
    "multiple of a half": {"type": "number", "multipleOf": 0.5, "minimum": 0, "maximum": 20},
    "draft 4 exclusive": {"type": "integer", "minimum": 5, "exclusiveMinimum": True, "maximum": 9},
    # strings
    "min length": {"type": "string", "minLength": 3, "maxLength": 12},
    "exact length": {"type": "string", "minLength": 5, "maxLength": 5},
    "pattern anchored": {"type": "string", "pattern": "^[a-z]{2,6}-[0-9]{3}$"},
    "pattern inside": {"type": "string", "pattern": "ab+c", "maxLength": 20},
    "pattern classes": {"type": "string", "pattern": r"^\d{3}\s\w+$", "maxLength": 16},
    "pattern alternatives": {"type": "string", "pattern": "^(red|green|blue)(er|est)?$"},
    "pattern and length": {"type": "string", "pattern": "^a*$", "minLength": 3, "maxLength": 9},
    "date": {"type": "string", "format": "date"},
    "time": {"type": "string", "format": "time"},
    "date-time": {"type": "string", "format": "date-time"},
    "email": {"type": "string", "format": "email"},
    "ipv4": {"type": "string", "format": "ipv4"},
    "ipv6": {"type": "string", "format": "ipv6"},
    "uuid": {"type": "string", "format": "uuid"},
    "hostname": {"type": "string", "format": "hostname"},
    "duration": {"type": "string", "format": "duration"},
    "openapi format": {"type": "integer", "format": "int64", "minimum": 0},
    # enum and const
    "enum strings": {"enum": ["red", "green", "blue"]},
    "enum mixed": {"enum": [1, "a", None, [1, 2], {"x": 1.5}, True]},
    "enum with type": {"type": "integer", "enum": [1, "a", 3]},
    "enum escapes": {"enum": ["é", "line\nbreak", "back\\slash", 'quo"te', "/", "\u2028"]},
    "const object": {"const": {"a": [1, 2, {"b": None}], "c": "d"}},
    "const in property": _object(kind={"const": "point"}, x={"type": "integer"}),
    # arrays
    "array": {"type": "array", "items": {"type": "integer"}},
    "array bounds": {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 4},
    "array exactly": {"type": "array", "items": _SHORT, "minItems": 3, "maxItems": 3},
    "array empty": {"type": "array", "maxItems": 0},
    "nested arrays": {
        "type": "array",
        "maxItems": 3,
        "items": {"type": "array", "maxItems": 2, "items": {"type": "number"}},
    },
    "tuple": {"type": "array", "prefixItems": [{"type": "integer"}, _SHORT], "items": False, "minItems": 2},
    "tuple and rest": {
        "type": "array",
        "prefixItems": [{"type": "integer"}],
        "items": {"type": "null"},
        "minItems": 2,
        "maxItems": 4,
    },
    "old tuple": {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "type": "array",
        "items": [{"type": "integer"}, {"type": "boolean"}],
        "additionalItems": False,
        "minItems": 2,
    },
    # objects
    "object": {"type": "object", "properties": {"a": {"type": "integer"}, "b": _SHORT}},
    "object required": _object(name=_SHORT, age={"type": "integer", "minimum": 0, "maximum": 150}),
    "object optional": {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": _SHORT, "c": {"type": "null"}},
        "required": ["b"],
    },
    "object open": {"type": "object", "properties": {"a": {"type": "integer"}}, "additionalProperties": _SHORT},
    "object map": {"type": "object", "additionalProperties": {"type": "integer"}, "maxProperties": 3},
    "object count": {"type": "object", "additionalProperties": {"type": "integer"}, "minProperties": 1},
    "object with more": {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
        "required": ["a", "b"],
        "minProperties": 3,
        "additionalProperties": {"type": "null"},
    },
    "required unlisted": {
        "type": "object",
        "properties": {"a": {"type": "null"}},
        "required": ["a", "z"],
        "maxProperties": 3,
    },
    "pattern properties": {
        "type": "object",
        "patternProperties": {"^n_[a-z]{1,4}$": {"type": "integer"}, "^s_[a-z]{1,4}$": _SHORT},
        "additionalProperties": False,
    },
    "mixed properties": {
        "type": "object",
        "properties": {"a": {"type": "integer"}},
        "patternProperties": {"^b": {"type": "boolean"}},
        "additionalProperties": {"type": "null"},
    },
    "forbidden property": {"type": "object", "properties": {"a": False, "b": {"type": "integer"}}},
    "odd names": _object(**{"a b": {"type": "null"}, 'q"q': {"type": "null"}, "ü\n": {"type": "null"}, "": _SHORT}),
    "nested objects": _object(
        person=_object(name=_SHORT, address=_object(street=_SHORT, number={"type": "integer", "minimum": 1})),
        tags={"type": "array", "items": _SHORT, "maxItems": 3},
    ),
    # combinations
    "any of": {"anyOf": [{"type": "integer"}, {"type": "array", "items": {"type": "null"}, "maxItems": 2}]},
    "any of with sibling": {"anyOf": [{"type": "string", "maxLength": 4}, {"type": "integer"}], "minLength": 2},
    "one of types": {"oneOf": [{"type": "string"}, {"type": "integer"}, {"type": "null"}]},
    "one of ranges": {"oneOf": [{"type": "integer", "maximum": 2}, {"type": "integer", "minimum": 5}]},
    "one of tagged": {
        "oneOf": [
            _object(kind={"const": "circle"}, r={"type": "number", "minimum": 0}),
            _object(kind={"const": "square"}, side={"type": "number", "minimum": 0}),
            _object(kind={"enum": ["dot", "nothing"]}),
        ]
    },
    "one of tagged open": {
        "oneOf": [
            {"type": "object", "properties": {"k": {"const": 1}, "x": {"type": "integer"}}, "required": ["k", "x"]},
            {"type": "object", "properties": {"k": {"const": 2}, "y": {"type": "integer"}}, "required": ["k", "y"]},
        ]
    },
    "one of lengths": {"oneOf": [{"type": "string", "maxLength": 2}, {"type": "string", "minLength": 5}]},
    "one of references": {
        "oneOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/b"}],
        "$defs": {"a": _object(t={"const": "a"}), "b": _object(t={"const": "b"}, n={"type": "integer"})},
    },
    "all of": {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 50}, {"multipleOf": 2}]},
    "all of objects": {
        "allOf": [
            {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
            {"type": "object", "properties": {"b": _SHORT}, "required": ["b"]},
        ],
        "maxProperties": 3,
    },
    "all of patterns": {"allOf": [{"type": "string", "pattern": "^a"}, {"pattern": "b$"}], "maxLength": 9},
    # references
    "definitions": {"definitions": {"a b": {"type": "integer"}}, "$ref": "#/definitions/a%20b"},
    "anchor": {"$defs": {"x": {"$anchor": "here", "type": "boolean"}}, "$ref": "#here"},
    "reference with siblings": {"$defs": {"n": {"type": "integer"}}, "$ref": "#/$defs/n", "minimum": 4, "maximum": 8},
    "reference into properties": {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"$ref": "#/properties/a"}},
        "required": ["a", "b"],
    },
    "linked list": {"$defs": {"node": _NODE}, "$ref": "#/$defs/node"},
    "tree": {
        "$defs": {
            "tree": _object(name=_SHORT, children={"type": "array", "items": {"$ref": "#/$defs/tree"}, "maxItems": 2})
        },
        "$ref": "#/$defs/tree",
    },
    "mutual recursion": {
        "$defs": {
            "even": {"anyOf": [{"type": "null"}, _object(odd={"$ref": "#/$defs/odd"})]},
            "odd": _object(even={"$ref": "#/$defs/even"}),
        },
        "$ref": "#/$defs/even",
    },
    "recursion to the root": {
        "type": "object",
        "properties": {"self": {"$ref": "#"}, "n": {"type": "integer"}},
        "required": ["n"],
        "additionalProperties": False,
    },
    "identified": {
        "$id": "https://example.com/s",
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Annotated",
        "description": "unknown names are annotations",
        "x-order": 3,
        **_object(a={"type": "integer", "default": 3, "examples": [1], "deprecated": True}),
    },
    # conditions and other keywords that are rewritten
    "if then else": {
        **_object(country={"enum": ["us", "nl", "de"]}, zip=_SHORT),
        "if": {"properties": {"country": {"const": "us"}}},
        "then": {"properties": {"zip": {"pattern": "^[0-9]{5}$"}}},
        "else": {"properties": {"zip": {"minLength": 2}}},
    },
    "several conditions": {
        **_object(kind={"enum": ["a", "b", "c"]}, n={"type": "integer", "minimum": 0, "maximum": 99}),
        "allOf": [
            {"if": {"properties": {"kind": {"const": "a"}}}, "then": {"properties": {"n": {"minimum": 50}}}},
            {"if": {"properties": {"kind": {"const": "b"}}}, "then": {"properties": {"n": {"multipleOf": 7}}}},
        ],
    },
    "not a text": {"type": "string", "maxLength": 8, "not": {"enum": ["", "no", "none"]}},
    "not both": {"type": "object", "properties": {"a": _SHORT, "b": _SHORT}, "not": {"required": ["a", "b"]}},
    "dependent": {"type": "object", "properties": {"a": _SHORT, "b": _SHORT}, "dependentRequired": {"a": ["b"]}},
    "names by pattern": {
        "type": "object",
        "propertyNames": {"pattern": "^[a-z]{1,6}$"},
        "additionalProperties": {"type": "integer"},
        "maxProperties": 3,
    },
    "names of a list": {
        "type": "object",
        "propertyNames": {"enum": ["red", "green", "blue"]},
        "additionalProperties": {"type": "boolean"},
    },
    "contains": {
        "type": "array",
        "items": {"type": ["integer", "null"]},
        "contains": {"type": "integer"},
        "maxItems": 4,
    },
    "unique": {"type": "array", "items": {"enum": ["a", "b", "c", "d"]}, "uniqueItems": True, "minItems": 2},
}
