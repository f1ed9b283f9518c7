"""Every spelling of a constraint becomes the same sampling parameter."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from phloem.core.errors import BadRequest
from phloem.core.request import SamplingParams
from phloem.protocol.body import Parser
from phloem.protocol.generate.body import GenerateBody
from phloem.protocol.sampling import native_params, openai_params
from phloem.protocol.structured import check
from phloem.server.chat.body import ChatBody
from phloem.server.completions.body import CompletionBody

SCHEMA = {"type": "object", "properties": {"ä": {"type": "integer"}}}
TAG = {"structures": [{"begin": "<f>", "schema": {}, "end": "</f>"}], "triggers": ["<f"]}
ON = frozenset({"grammar"})
_chat, _completion, _generate = Parser(ChatBody), Parser(CompletionBody), Parser(GenerateBody)


def chat(**fields: Any) -> SamplingParams:
    data = json.dumps({"messages": [{"role": "user", "content": "x"}], **fields}).encode()
    return openai_params(_chat.parse(data, ON), 5)


def constraint(params: SamplingParams) -> tuple[str, Any]:
    names = ("json_schema", "regex", "ebnf", "structural_tag")
    (name,) = [name for name in names if getattr(params, name) is not None]
    text = getattr(params, name)
    return name, json.loads(text) if name in ("json_schema", "structural_tag") else text


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "strict": True}}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "strict": None}}},
        {"response_format": {"type": "json_schema", "name": "n", "schema": SCHEMA}},
        {"response_format": {"type": "json_object", "schema": SCHEMA}},
        {"json_schema": SCHEMA},
        {"json_schema": json.dumps(SCHEMA)},
        {"guided_json": SCHEMA},
        {"guided_json": json.dumps(SCHEMA)},
        {"structured_outputs": {"json": SCHEMA}},
        {"structured_outputs": {"json": json.dumps(SCHEMA), "regex": None, "disable_any_whitespace": True}},
        {"extra_body": {"guided_json": SCHEMA}},
        {"extra_body": {"structured_outputs": {"json": SCHEMA}}},
        {
            "guided_json": SCHEMA,
            "response_format": {"type": "text"},
            "regex": "",
            "guided_decoding_backend": "outlines",
        },
    ],
)
def test_schemas(fields: dict[str, Any]) -> None:
    assert constraint(chat(**fields)) == ("json_schema", SCHEMA)


@pytest.mark.parametrize(
    ("fields", "name", "value"),
    [
        ({"response_format": {"type": "json_object"}}, "json_schema", {"type": "object"}),
        ({"guided_json_object": True}, "json_schema", {"type": "object"}),
        ({"structured_outputs": {"json_object": True}}, "json_schema", {"type": "object"}),
        ({"guided_json": {}}, "json_schema", {}),
        ({"guided_json": True}, "json_schema", True),
        ({"regex": "a+"}, "regex", "a+"),
        ({"guided_regex": "a+"}, "regex", "a+"),
        ({"structured_outputs": {"regex": "a+"}}, "regex", "a+"),
        ({"response_format": {"type": "regex", "pattern": "a+"}}, "regex", "a+"),
        ({"ebnf": 'root ::= "a"'}, "ebnf", 'root ::= "a"'),
        ({"guided_grammar": 'root ::= "a"'}, "ebnf", 'root ::= "a"'),
        ({"structured_outputs": {"grammar": 'root ::= "a"'}}, "ebnf", 'root ::= "a"'),
        ({"response_format": {"type": "grammar", "grammar": 'root ::= "a"'}}, "ebnf", 'root ::= "a"'),
        ({"structural_tag": TAG}, "structural_tag", TAG),
        ({"structural_tag": json.dumps(TAG)}, "structural_tag", TAG),
        ({"response_format": {"type": "structural_tag", **TAG}}, "structural_tag", {"type": "structural_tag", **TAG}),
        ({"structured_outputs": {"structural_tag": TAG}}, "structural_tag", TAG),
    ],
)
def test_other_constraints(fields: dict[str, Any], name: str, value: Any) -> None:
    assert constraint(chat(**fields)) == (name, value)


def test_choices_become_a_pattern_that_means_them() -> None:
    options = ["yes", "no (really)", "a|b", "1+1=2?", "ä-ö\n", r"back\slash", "[x]{2}^$#&~/"]
    for fields in ({"guided_choice": options}, {"structured_outputs": {"choice": options}}):
        name, pattern = constraint(chat(**fields))
        assert name == "regex"
        assert all(re.fullmatch(pattern, option) for option in options)
        assert not re.fullmatch(pattern, "a") and not re.fullmatch(pattern, "111=2")


@pytest.mark.parametrize(
    ("fields", "param", "word"),
    [
        ({"regex": "a", "guided_json": {"type": "null"}}, "guided_json", "only one constraint"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs.choice", "only one"),
        ({"regex": "a", "extra_body": {"regex": "b"}}, "regex", "only one constraint"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema", "needs"),
        ({"response_format": {"type": "yaml"}}, "response_format.type", "json_object"),
        ({"response_format": {"kind": "text"}}, "response_format", "type"),
        ({"response_format": {"type": "regex"}}, "response_format", "text"),
        ({"structured_outputs": {"yaml": 1}}, "structured_outputs.yaml", "known"),
        ({"structured_outputs": {"whitespace_pattern": " *"}}, "structured_outputs.whitespace_pattern", "supported"),
        ({"structured_outputs": {"regex": 5}}, "structured_outputs.regex", "a text"),
        ({"guided_choice": ["a", ""]}, "guided_choice", "empty"),
        ({"extra_body": {"temperature": 1}}, "extra_body.temperature", "unknown field"),
        ({"json_schema": "{"}, "json_schema", "line 1"),
        ({"json_schema": {"properties": {"a": {"type": "wat"}}}}, "json_schema", "#/properties/a/type"),
        ({"guided_json": {"items": {"$ref": "#/no"}}}, "guided_json", "#/items/$ref"),
        ({"structural_tag": {"structures": []}}, "structural_tag", "triggers"),
        ({"regex": "a{99999}"}, "regex", "repetition"),
    ],
)
def test_what_is_wrong_is_named_before_anything_runs(fields: dict[str, Any], param: str, word: str) -> None:
    with pytest.raises(BadRequest) as caught:
        chat(**fields)
    assert caught.value.param == param and word in caught.value.message


def test_completions_and_generate_take_them_too() -> None:
    body = _completion.parse(json.dumps({"prompt": "x", "response_format": {"type": "json_object"}}).encode(), ON)
    assert constraint(openai_params(body, 5)) == ("json_schema", {"type": "object"})
    for schema in (SCHEMA, json.dumps(SCHEMA)):
        data = {"text": "x", "sampling_params": {"json_schema": schema, "regex": "", "ebnf": None}}
        native = _generate.parse(json.dumps(data).encode(), ON)
        assert not isinstance(native.sampling_params, list)
        assert constraint(native_params(native.sampling_params)) == ("json_schema", SCHEMA)


def test_without_the_feature_each_spelling_is_refused() -> None:
    for fields in (
        {"guided_regex": "a"},
        {"structured_outputs": {"regex": "a"}},
        {"extra_body": {"regex": "a"}},
        {"response_format": {"type": "json_object"}},
    ):
        with pytest.raises(BadRequest, match="not supported yet"):
            _completion.parse(json.dumps({"prompt": "x", **fields}).encode())


def test_long_schemas_are_left_to_the_engine() -> None:
    check(SamplingParams(json_schema=json.dumps({"type": "wat", "description": "x" * 40_000})))
    with pytest.raises(BadRequest, match="at most"):
        check(SamplingParams(json_schema=json.dumps({"description": "x" * 400_000})))
