"""A format for the text answer together with tools: an answer is calls that keep to their schemas, or such a text."""

from __future__ import annotations

import itertools
import json
import random
from typing import Any

import jsonschema
import pytest
from test_tools_strict import CASES, FORMATS, GOOD, NOW, SCHEMAS, TOOLS, encode, engine, fits, tool, walk, words

from phloem.core.errors import BadRequest
from phloem.core.request import SamplingParams
from phloem.grammar import _base
from phloem.protocol.structured import answer_shape
from phloem.server.chat.toolplan import ToolPlan, plan
from phloem.text.answer import FormattedAnswer, thinking_parser
from phloem.text.tools._base import Arguments, CallStart, Text

pytest.importorskip("llguidance")

ANSWER: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "parameters": {"type": "object", "properties": {}, "additionalProperties": False},
        "list": {"type": "array", "items": {"type": ["string", "number", "boolean", "null"]}, "maxItems": 3},
    },
    "required": ["name", "list"],
    "additionalProperties": False,
}
FINAL = "<|channel|>final<|message|>"


def planned(form: str, tools: list[dict[str, Any]], choice: Any = "auto", **constraint: Any) -> ToolPlan:
    return plan(tools, choice, None, form, answer_shape(SamplingParams(**constraint)))


def compiled(form: str, special: bool, made: ToolPlan) -> Any:
    assert made.constraint is not None and made.constraint[0] == "structural_tag"
    constraint = _base.read_structural_tag(made.constraint[1])
    own = engine(form if special else None)
    assert own.decline(constraint) is None
    return own.compile(constraint)


def read(form: str, made: ToolPlan, text: str) -> tuple[str, list[tuple[str, str]]]:
    """The text and the calls of an answer, as a client gets them: the same however it arrives."""
    found: list[tuple[str, list[tuple[str, str]]]] = []
    for size in (len(text) or 1, 1, 5):
        thinking = thinking_parser("gpt_oss", "") if form == "gpt_oss" else None
        parser = FormattedAnswer(thinking, made.parser())
        said, calls = "", []
        for at in range(0, len(text), size):
            for event in parser.push(text[at : at + size], at + size >= len(text)):
                if isinstance(event, Text):
                    said += event.text
                elif isinstance(event, CallStart):
                    calls.append((event.name, ""))
                elif isinstance(event, Arguments):
                    calls[-1] = (calls[-1][0], calls[-1][1] + event.text)
        found.append((said, calls))
    assert found[0] == found[1] == found[2], text
    return found[0]


def answered(form: str, text: str) -> str:
    return FINAL + text if form == "gpt_oss" else text


def called(form: str) -> str:
    """A good call, as it is written where the answer is JSON too."""
    return GOOD[form].replace(": ", ":").replace(", ", ",") if form == "llama3" else GOOD[form]


@pytest.mark.some(16)
@pytest.mark.slow
@pytest.mark.parametrize(("form", "special"), CASES)
def test_an_answer_is_calls_or_keeps_to_the_format(form: str, special: bool) -> None:
    own = words(form if special else None)
    made = planned(form, TOOLS, json_schema=json.dumps(ANSWER))
    grammar = compiled(form, special, made)
    good = called(form)
    assert fits(grammar, own, good)
    said, calls = read(form, made, good)
    assert said == "" and [(name, json.loads(text)) for name, text in calls] == [("find", {"limit": 3, "query": "x"})]
    for value in (
        {"name": "find", "list": []},
        {"name": "find", "parameters": {}, "list": [None, 1.5, "]"]},
        {"name": "<tool_call>find<arg_key>limit</arg_key><arg_value>3</arg_value></tool_call>", "list": [good]},
    ):
        text = json.dumps(value, separators=(",", ":"), ensure_ascii=False)
        if special and any(mark in text for mark in own.special_by_text):
            continue  # special tokens never stand in texts
        assert fits(grammar, own, answered(form, text)), text
        assert read(form, made, answered(form, text)) == (text, []), text
    text = '{"name":"find","list":[]}'
    for wrong in (
        answered(form, "No call at all."),
        answered(form, '{"name":"find"}'),
        answered(form, text) + good,
        good + "Well.",
        good.replace("find", "mind"),
        "Well. " + good,
    ):
        assert not fits(grammar, own, wrong), wrong


@pytest.mark.some(16)
@pytest.mark.slow
@pytest.mark.parametrize(("form", "special"), CASES)
def test_random_answers_beside_tools_are_valid(form: str, special: bool) -> None:
    own = words(form if special else None)
    made = planned(form, TOOLS, json_schema=json.dumps(ANSWER))
    grammar = compiled(form, special, made)
    begins = ("", "{", FORMATS.module(form).Parser.trigger or called(form)[:3])
    ended = 0
    for seed in range(6):
        begin = answered(form, "{") if form == "gpt_oss" and seed % 3 == 1 else begins[seed % 3]
        text = walk(grammar, own, seed, begin)
        if text is None:
            continue
        ended += 1
        said, calls = read(form, made, text)
        assert bool(said) != bool(calls), text
        if said:
            jsonschema.validate(json.loads(said), ANSWER)
        for name, arguments in calls:
            jsonschema.validate(json.loads(arguments), SCHEMAS[name])
    assert ended


@pytest.mark.slow
@pytest.mark.parametrize(("form", "special"), CASES)
@pytest.mark.parametrize(
    ("constraint", "right", "wrong"),
    [
        ({"regex": "[a-z<>_]+( [0-9]+)?"}, ("yes", "no 12"), ("Yes", "")),
        ({"ebnf": 'root ::= "yes" | "no" " " [0-9]+'}, ("yes", "no 12"), ("maybe",)),
        ({"json_schema": '{"type":"array","items":{"type":"integer"}}'}, ("[]", "[1,2]"), ("[x]", "{}")),
        ({"json_schema": '{"type":"string"}'}, ('"find(x)"',), ("find", "[find(")),
    ],
)
def test_every_kind_of_format_goes_with_tools(
    form: str, special: bool, constraint: dict[str, str], right: tuple[str, ...], wrong: tuple[str, ...]
) -> None:
    own = words(form if special else None)
    made = planned(form, [tool("find", SCHEMAS["find"]), tool("now", NOW)], **constraint)
    grammar = compiled(form, special, made)
    call = called(form) if "json_schema" in constraint else GOOD[form]
    if "json_schema" not in constraint:  # a text in words could begin as a call without a marker does
        call = {"llama3": "<|python_tag|>" + call, "pythonic": f"<|python_start|>{call}<|python_end|>"}.get(form, call)
    assert fits(grammar, own, call)
    assert [name for name, _ in read(form, made, call)[1]] == ["find"]
    for text in right:
        assert fits(grammar, own, answered(form, text)), text
        assert read(form, made, answered(form, text)) == (text, [])
    for text in wrong:
        assert not fits(grammar, own, answered(form, text)), text


@pytest.mark.parametrize("form", FORMATS.names())
def test_a_forced_call_leaves_nothing_for_the_format_to_bind(form: str) -> None:
    for choice in ("required", {"type": "function", "function": {"name": "now"}}):
        assert planned(form, TOOLS, choice, regex="[a-z]+") == planned(form, TOOLS, choice)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["qwen3_coder", "glm45", "minimax_m2", "deepseekv32", "step3", "pythonic"])
def test_a_tool_whose_schema_cannot_be_written_is_still_called_where_it_is_not_strict(form: str) -> None:
    schema = {**SCHEMAS["find"], "anyOf": [{"required": ["limit"]}, {"required": ["query"]}]}
    own = words(form)
    made = planned(form, [tool("find", schema, strict=False), tool("now", NOW)], regex="[a-z]+")
    grammar = compiled(form, True, made)
    for text in (GOOD[form], GOOD[form].replace("3", '"three"', 1)):
        call = f"<|python_start|>{text}<|python_end|>" if form == "pythonic" else text
        assert fits(grammar, own, call), call
        assert [name for name, _ in read(form, made, call)[1]] == ["find"]
    assert fits(grammar, own, "word") and not fits(grammar, own, "Words")
    with pytest.raises(BadRequest, match="cannot be enforced"):
        planned(form, [tool("find", schema), tool("now", NOW)], regex="[a-z]+")


@pytest.mark.slow
@pytest.mark.parametrize(("form", "special"), CASES)
def test_a_schema_that_no_grammar_keeps_to_costs_a_tool_that_is_not_strict_nothing(form: str, special: bool) -> None:
    schema = {**SCHEMAS["find"], "unevaluatedProperties": {"type": "string"}, "anyOf": [{"contentSchema": {}}, {}]}
    own = words(form if special else None)
    tools = [tool("find", schema, strict=False), tool("now", NOW)]
    grammar = compiled(form, special, planned(form, tools, json_schema=json.dumps(ANSWER)))
    assert fits(grammar, own, called(form)) and fits(grammar, own, answered(form, '{"name":"x","list":[]}'))
    assert not fits(grammar, own, called(form).replace("find", "mind"))
    grammar = compiled(form, special, plan(tools, "auto", None, form))
    assert fits(grammar, own, GOOD[form]) and not fits(grammar, own, GOOD[form].replace("find", "mind"))


def test_without_a_call_that_can_be_written_the_format_stands_alone() -> None:
    made = planned("pythonic", [tool("write-file", NOW, strict=False)], regex="[a-z]+")
    assert made.constraint is None and made.tools
    assert planned("hermes", [], regex="a").constraint is None
    assert plan(TOOLS[1:2], "none", None, "hermes", {"type": "regex", "pattern": "a"}).constraint is None


# --- forced calls: nothing but calls, told from their beginning


@pytest.mark.slow
@pytest.mark.parametrize(("form", "special"), CASES)
def test_nothing_but_calls_comes_where_one_is_required(form: str, special: bool) -> None:
    own = words(form if special else None)
    for choice, several in (("required", True), ({"type": "function", "function": {"name": "find"}}, False)):
        made = plan([tool("find", SCHEMAS["find"]), tool("now", NOW)], choice, None, form)
        grammar = compiled(form, special, made)
        good = GOOD[form]
        matcher = grammar.matcher()
        assert matcher.accept(encode(own, good)) == len(encode(own, good)) and matcher.may_end
        for more in (" Well.", "\n\nDone", good + "x"):
            assert not fits(grammar, own, good + more), more
        one = FORMATS.module(form).Parser
        if one.between == "\n" and one.trigger and not one.sections:
            assert fits(grammar, own, f"{good}\n{good}") == several
            assert fits(grammar, own, good + good) == several


@pytest.mark.parametrize("form", FORMATS.names())
def test_a_forced_call_streams_from_its_name_and_is_partial_when_it_is_cut(form: str) -> None:
    good = GOOD.get(form, '[{"name": "find", "parameters": {"limit":3,"query":"x"}}]')
    good = good.replace("x", "word " * 12, 1) if form not in ("minimax_m2", "pythonic", "apertus") else good
    for choice in ("required", {"type": "function", "function": {"name": "find"}}):
        made = plan([tool("find", SCHEMAS["find"]), tool("now", NOW)], choice, None, form)
        name_ends = good.index("find") + len("find") + 2
        whole = collected(made, good, cut=False)
        assert whole[0] == "" and json.loads(whole[1][0][1])["limit"] == 3
        for size in range(len(good)):
            said, calls = collected(made, good[:size], cut=True)
            assert said == "", (size, said)
            assert len(calls) <= 1 and all(name == "find" for name, _ in calls)
            assert calls or size < name_ends + 40
            if calls and calls[0][1]:
                assert whole[1][0][1].startswith(calls[0][1].rstrip("}")) or form == "pythonic"
            assert isinstance(choice, str) or calls or not good[:size].strip(), "its name is known before it is written"
        parser = made.parser()
        assert parser is not None
        at = next(at for at, char in enumerate(good) if any(isinstance(e, CallStart) for e in parser.push(char)))
        assert at < good.index("3"), "announced before its arguments"


def collected(made: ToolPlan, text: str, cut: bool) -> tuple[str, list[tuple[str, str]]]:
    parser = FormattedAnswer(None, made.parser())
    said, calls = "", []
    rand = random.Random(len(text))
    edges = sorted({0, len(text), *(rand.randint(0, len(text)) for _ in range(3))})
    pieces = [text[begin:end] for begin, end in itertools.pairwise(edges)] or [""]
    for number, piece in enumerate(pieces):
        for event in parser.push(piece, number == len(pieces) - 1, cut):
            if isinstance(event, Text):
                said += event.text
            elif isinstance(event, CallStart):
                calls.append((event.name, ""))
            elif isinstance(event, Arguments):
                calls[-1] = (calls[-1][0], calls[-1][1] + event.text)
    return said, calls


@pytest.mark.parametrize("form", [name for name in FORMATS.names() if name != "json_array"])
def test_a_call_that_the_limit_cuts_is_a_part_of_one_also_where_none_was_forced(form: str) -> None:
    made = plan([tool("find", SCHEMAS["find"], strict=False), tool("now", NOW, strict=False)], "auto", None, form)
    good = GOOD[form]
    text = good[: good.index("query") + 3]
    said, calls = collected(made, text, cut=True)
    assert (said, [name for name, _ in calls]) == ("", ["find"]) and "3" in calls[0][1]
    assert collected(made, text, cut=False) == (text, []), "what the model itself left unfinished is text"


@pytest.mark.parametrize("form", [name for name in FORMATS.names() if name not in ("json_array", "gpt_oss")])
def test_of_a_second_call_that_is_cut_nothing_becomes_text(form: str) -> None:
    tools = [tool("find", SCHEMAS["find"]), tool("now", NOW)]
    good = called(form)
    kind = FORMATS.module(form).Parser
    joined = {"llama3": "; ", "pythonic": ", "}.get(form, "\n")
    for made in (planned(form, tools, json_schema=json.dumps(ANSWER)), plan(tools, "required", None, form)):
        if kind.sections or form == "pythonic":
            continue  # calls of one section stand behind its marker
        for size in range(1, len(good)):
            said, calls = collected(made, good + joined + good[:size], cut=True)
            assert said == "" and [name for name, _ in calls] in (["find"], ["find", "find"]), (size, said)
