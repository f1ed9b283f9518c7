"""Strict and forced calls: what the grammar of a format admits, its parser reads back as calls that are valid."""

from __future__ import annotations

import dataclasses
import functools
import json
import random
from typing import Any

import jsonschema
import numpy as np
import pytest
from grammar_support import vocabulary

from phloem.core.errors import BadRequest
from phloem.core.request import SamplingParams
from phloem.grammar import _base
from phloem.grammar._base import EngineOptions, Vocabulary
from phloem.grammar._manager import ENGINES
from phloem.server.chat.toolplan import plan
from phloem.text.formats import TOOLS as FORMATS
from phloem.text.tools._base import collect
from phloem.text.tools._grammar import Unspeakable
from phloem.text.tools._parameters import FORMATS as TEXT_FORMATS

pytest.importorskip("llguidance")

FORMS = [name for name in FORMATS.names() if name != "json_array"]
# Markers as plain text, and as special tokens. Harmony's are special in every vocabulary that has them.
CASES = [(form, special) for form in FORMS for special in (False, True) if special or form != "gpt_oss"]
# Markers as special tokens are walked from a few seeds; from more, and as plain text, in the whole suite.
WALKS = [pytest.param(form, special, 4) for form, special in CASES if special]
WALKS += [pytest.param(form, special, 12, marks=pytest.mark.slow) for form, special in CASES]
# Texts of the formats that are special tokens in their models' vocabularies.
SPECIAL = {
    "hermes": ("<tool_call>", "</tool_call>"),
    "ernie45": ("<tool_call>", "</tool_call>"),
    "qwen3_coder": ("<tool_call>", "</tool_call>"),
    "llama3": ("<|python_tag|>",),
    "pythonic": ("<|python_start|>", "<|python_end|>"),
    "mistral": ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"),
    "jamba": ("<tool_calls>", "</tool_calls>"),
    "deepseekv32": ("｜DSML｜",),
    "glm45": ("<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
    "gpt_oss": ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|constrain|>", "<|call|>"),
    "seed_oss": ("<seed:tool_call>", "</seed:tool_call>"),
    "granite": ("<|tool_call|>", "<tool_call>"),
    "phi4_mini_json": (),
    "apertus": ("<|tools_prefix|>", "<|tools_suffix|>"),
    "cohere_command": ("<|START_ACTION|>", "<|END_ACTION|>"),
    "internlm": ("<|action_start|>", "<|plugin|>", "<|action_end|>"),
    "longcat": ("<longcat_tool_call>", "</longcat_tool_call>"),
    "lfm2": ("<|tool_call_start|>", "<|tool_call_end|>"),
    "olmo3": (),
    "gemma4": ("<|tool_call>", "<tool_call|>", '<|"|>'),
    "minimax_m2": ("<minimax:tool_call>", "</minimax:tool_call>"),
    "step3": (
        "<｜tool_calls_begin｜>",
        "<｜tool_calls_end｜>",
        "<｜tool_call_begin｜>",
        "<｜tool_call_end｜>",
        "<｜tool_sep｜>",
    ),
    **dict.fromkeys(
        ("deepseekv3", "deepseekv31"),
        (
            "<｜tool▁calls▁begin｜>",
            "<｜tool▁calls▁end｜>",
            "<｜tool▁call▁begin｜>",
            "<｜tool▁call▁end｜>",
            "<｜tool▁sep｜>",
        ),
    ),
    "kimi_k2": (
        *("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>", "<|tool_call_begin|>"),
        *("<|tool_call_argument_begin|>", "<|tool_call_end|>"),
    ),
}
# What a walk writes at times to get out of a text.
CLOSING = (
    "\n</parameter>",
    "</parameter>",
    "</arg_value>",
    "</｜DSML｜parameter>",
    "</steptml:parameter>",
    '"',
    "}",
    "]",
)
CLOSING += ("<|message|>", "<|end|>", '<|"|>')

BOOK: dict[str, Any] = {
    "type": "object",
    "properties": {
        "guest": {"type": "string", "description": "who"},
        "room": {"$ref": "#/$defs/Room"},
        "nights": {"type": "integer", "minimum": 1, "maximum": 14},
        "code": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]+$"},
        "note": {"anyOf": [{"type": "string", "minLength": 2, "maxLength": 9}, {"type": "null"}]},
        "board": {"type": ["string", "null"], "enum": ["half", "full", None]},
        "floor": {"enum": [1, 2, "top"]},
        "paid": {"type": "boolean"},
        "day": {"type": "string", "format": "date"},
        "extras": {"type": "array", "items": {"$ref": "#/$defs/Extra"}, "maxItems": 2},
        "anything": {"description": "no type at all"},
        "score": {"anyOf": [{"type": "number", "minimum": 0, "maximum": 1}, {"type": "null"}]},
    },
    "required": ["guest", "room", "nights", "paid"],
    "additionalProperties": False,
    "$defs": {
        "Room": {"enum": ["single", "double"]},
        "Extra": {
            "type": "object",
            "properties": {"name": {"type": "string", "maxLength": 5}, "of": {"$ref": "#/$defs/Extra"}},
            "required": ["name"],
            "additionalProperties": False,
        },
    },
}
NOW: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
FIND: dict[str, Any] = {
    "type": "object",
    "properties": {"limit": {"type": "integer"}, "query": {"type": "string"}},
    "additionalProperties": False,
}
SCHEMAS = {"book": BOOK, "now": NOW, "find": FIND}


def tool(name: str, schema: dict[str, Any], strict: bool = True) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": schema, "strict": strict}}


TOOLS = [tool(name, schema) for name, schema in SCHEMAS.items()]


@functools.cache
def words(form: str | None) -> Vocabulary:
    """The demo model's vocabulary; with a format, its markers stand for the names of special tokens."""
    plain = vocabulary()
    if form is None:
        return plain
    spare = sorted(plain.special - set(plain.eos_ids))
    tokens = list(plain.tokens)
    for token, name in zip(spare, SPECIAL[form], strict=False):
        tokens[token] = name.encode()
    return dataclasses.replace(plain, tokens=tokens)


@functools.cache
def engine(form: str | None) -> Any:
    return ENGINES.module("llguidance").Engine(words(form), EngineOptions())


def compiled(form: str, special: bool, tools: list[dict[str, Any]], choice: Any = "auto", parallel: bool = True) -> Any:
    made = plan(tools, choice, parallel, form)
    assert made.constraint is not None and made.format == form
    constraint = _base.constraint_of(SamplingParams(**{made.constraint[0]: made.constraint[1]}))
    assert constraint is not None
    own = engine(form if special else None)
    assert own.decline(constraint) is None
    return own.compile(constraint)


def encode(own: Vocabulary, text: str) -> list[int]:
    """Tokens of a text that may name special tokens."""
    special = {name: token for name, token in own.special_by_text.items() if name in text and token not in own.eos_ids}
    if not special:
        return own.encode(text)
    name = min(special, key=lambda item: (text.index(item), -len(item)))
    before, after = text.split(name, 1)
    return [*(own.encode(before) if before else []), special[name], *(encode(own, after) if after else [])]


def takes(matcher: Any, own: Vocabulary, text: str) -> bool:
    """Take the text if all of it fits."""
    ids = encode(own, text)
    taken = matcher.accept(ids)
    if taken < len(ids):
        matcher.rollback(taken)
    return taken == len(ids)


def fits(grammar: Any, own: Vocabulary, text: str) -> bool:
    matcher = grammar.matcher()
    return takes(matcher, own, text) and matcher.may_end


def walk(grammar: Any, own: Vocabulary, seed: int, begin: str = "", limit: int = 700) -> str | None:
    """A random text of the grammar; None if it did not end within the limit."""
    matcher, rng = grammar.matcher(), random.Random(seed)
    mask = own.new_mask()
    ends = list(own.eos_ids)
    text = begin.encode()
    assert takes(matcher, own, begin), begin
    for step in range(limit):
        matcher.fill(mask)
        may = np.unpackbits(mask.view(np.uint8), bitorder="little").view(np.bool_)
        if may[ends].any() and (rng.random() < 0.4 or not np.delete(may, ends).any()):
            return text.decode()
        closing = rng.choice(CLOSING)
        if rng.random() < 0.2 + step / 200 and takes(matcher, own, closing):
            text += closing.encode()
            continue
        may[ends] = False
        options = np.flatnonzero(may)
        assert len(options)
        short = [token for token in options[:2000].tolist() if len(own.tokens[token]) < 4 or token in own.special]
        token = rng.choice(short) if short and rng.random() < 0.5 else int(options[rng.randrange(len(options))])
        assert matcher.accept([token]) == 1
        text += own.tokens[token]
    return None


def check(form: str, text: str) -> list[str]:
    """The names of the calls in a text, after their arguments were validated."""
    parsed = FORMATS.module(form).Parser(TOOLS).parse(text)
    for call in parsed.calls:
        kind = jsonschema.Draft202012Validator
        kind(SCHEMAS[call.name], format_checker=kind.FORMAT_CHECKER).validate(json.loads(call.arguments))
    return [call.name for call in parsed.calls]


BEGIN = {
    "llama3": ("{", "<|python_tag|>{"),
    "pythonic": ("[", "<|python_start|>["),
    "mistral": ("Well. [TOOL_CALLS]",),
    "deepseekv32": ("Well.<｜DSML｜function_calls>\n",),
    "gpt_oss": ("<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary to=functions.",),
    "qwen3_coder": ("Well.\n<tool_call>", "<function="),
    "minimax_m2": ("Well.\n<minimax:tool_call>",),
}


@pytest.mark.some(18)
@pytest.mark.slow
@pytest.mark.parametrize(("form", "special", "walks"), WALKS)
def test_strict_calls_are_read_back_and_valid(form: str, special: bool, walks: int) -> None:
    own = words(form if special else None)
    begins = BEGIN.get(form) or (f"Well.\n{FORMATS.module(form).Parser.trigger}",)
    for tools, seeds in ((TOOLS, walks), (TOOLS[:1], 2 * walks)):
        grammar = compiled(form, special, tools)
        names: list[str] = []
        for seed in range(seeds):
            text = walk(grammar, own, seed, begins[seed % len(begins)])
            if text is not None:
                found = check(form, text)
                assert found, text
                names += found
        assert len(names) >= seeds // 3, names


@pytest.mark.some(18)
@pytest.mark.slow
@pytest.mark.parametrize(("form", "special", "walks"), WALKS)
def test_forced_calls_are_read_back_and_valid(form: str, special: bool, walks: int) -> None:
    own = words(form if special else None)
    several = compiled(form, special, TOOLS, "required")
    one = compiled(form, special, TOOLS, "required", parallel=False)
    named = compiled(form, special, TOOLS, {"type": "function", "function": {"name": "book"}})
    ended = 0
    for seed in range(1 + walks // 3):
        for grammar, wanted in ((several, None), (one, None), (named, "book")):
            text = walk(grammar, own, seed)
            if text is None:
                continue
            ended += 1
            names = check(form, text)
            assert names, text
            assert grammar is several or len(names) == 1, text
            assert wanted is None or names == [wanted]
    assert ended >= walks // 2


GOOD: dict[str, str] = {
    "hermes": '<tool_call>\n{"name": "find", "arguments": {"limit":3,"query":"x"}}\n</tool_call>',
    "llama3": '{"name": "find", "parameters": {"limit":3,"query":"x"}}',
    "pythonic": '[find(limit=3, query="x")]',
    "jamba": '<tool_calls>[\n    {"name": "find", "arguments": {"limit":3,"query":"x"}}\n]</tool_calls>',
    "mistral": '[TOOL_CALLS][{"name": "find", "arguments": {"limit":3,"query":"x"}}]',
    "deepseekv3": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>find\n```json\n"
    '{"limit":3,"query":"x"}'
    "\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    "deepseekv31": '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>find<｜tool▁sep｜>{"limit":3,"query":"x"}'
    "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    "deepseekv32": '<｜DSML｜function_calls>\n<｜DSML｜invoke name="find">\n'
    '<｜DSML｜parameter name="limit" string="false">3</｜DSML｜parameter>\n'
    '<｜DSML｜parameter name="query" string="true">x</｜DSML｜parameter>\n</｜DSML｜invoke>\n'
    "</｜DSML｜function_calls>",
    "glm45": "<tool_call>find\n<arg_key>limit</arg_key>\n<arg_value>3</arg_value>\n<arg_key>query</arg_key>\n"
    "<arg_value>x</arg_value>\n</tool_call>",
    "kimi_k2": "<|tool_calls_section_begin|><|tool_call_begin|>functions.find:0<|tool_call_argument_begin|>"
    '{"limit":3,"query":"x"}<|tool_call_end|><|tool_calls_section_end|>',
    "gpt_oss": '<|channel|>commentary to=functions.find <|constrain|>json<|message|>{"limit":3,"query":"x"}<|call|>',
    "minimax_m2": '<minimax:tool_call>\n<invoke name="find">\n<parameter name="limit">3</parameter>\n'
    '<parameter name="query">x</parameter>\n</invoke>\n</minimax:tool_call>',
    "qwen3_coder": "<tool_call>\n<function=find>\n<parameter=limit>\n3\n</parameter>\n<parameter=query>\nx\n"
    "</parameter>\n</function>\n</tool_call>",
    "step3": '<｜tool_calls_begin｜>\n<｜tool_call_begin｜>function<｜tool_sep｜><steptml:invoke name="find">\n'
    '<steptml:parameter name="limit">3</steptml:parameter>\n<steptml:parameter name="query">x</steptml:parameter>\n'
    "</steptml:invoke><｜tool_call_end｜>\n<｜tool_calls_end｜>",
}
GOOD["ernie45"] = GOOD["hermes"]
_ARRAY = '[{"name": "find", "arguments": {"limit":3,"query":"x"}}]'
GOOD |= {
    "seed_oss": GOOD["qwen3_coder"].replace("tool_call>", "seed:tool_call>"),
    "granite": f"<|tool_call|>{_ARRAY}",
    "phi4_mini_json": f"functools{_ARRAY}",
    "apertus": '<|tools_prefix|>[{"find": {"limit":3,"query":"x"}}]<|tools_suffix|>',
    "cohere_command": '<|START_ACTION|>[{"tool_call_id": "0", "tool_name": "find", "parameters": '
    '{"limit":3,"query":"x"}}]<|END_ACTION|>',
    "internlm": '<|action_start|><|plugin|>\n{"name": "find", "parameters": {"limit":3,"query":"x"}}<|action_end|>',
    "longcat": GOOD["hermes"].replace("tool_call>", "longcat_tool_call>"),
    "lfm2": f"<|tool_call_start|>{GOOD['pythonic']}<|tool_call_end|>",
    "olmo3": '<function_calls>find(limit=3, query="x")</function_calls>',
    "gemma4": '<|tool_call>call:find{limit:3,query:<|"|>x<|"|>}<tool_call|>',
}
STRICT_FIND = {**FIND, "required": ["limit", "query"]}


def without_query(text: str) -> str:
    """The call without its last parameter."""
    for piece in (',"query":"x"', ', query="x"', ',query:<|"|>x<|"|>', "<parameter=query>\nx\n</parameter>\n"):
        text = text.replace(piece, "")
    tags = [(f'<{prefix}parameter name="query"', f"</{prefix}parameter>\n") for prefix in ("", "｜DSML｜", "steptml:")]
    for begin, end in (("<arg_key>query", "</arg_value>\n"), *tags):
        if begin in text:
            at = text.index(begin)
            text = text[:at] + text[text.index(end, at) + len(end) :]
    return text


@pytest.mark.slow
@pytest.mark.parametrize(("form", "special"), CASES)
def test_what_a_strict_grammar_refuses(form: str, special: bool) -> None:
    own = words(form if special else None)
    tools = [tool("find", STRICT_FIND), tool("now", NOW)]
    good = GOOD[form]
    short = without_query(good)
    assert len(short) < len(good)
    wrong = {
        "a parameter is missing": short,
        "the type is wrong": good.replace("3", "x", 1) if form != "deepseekv3" else good.replace(":3", ":x"),
        "no such tool": good.replace("find", "mind"),
        "an unknown parameter": good.replace("limit", "bound"),
    }
    for choice in ("auto", "required"):
        grammar = compiled(form, special, tools, choice)
        assert fits(grammar, own, good), (choice, good)
        for why, text in wrong.items():
            assert not fits(grammar, own, text), (choice, why)
        assert fits(grammar, own, "No call at all.") == (choice == "auto")
    loose = compiled(form, special, [tool("find", FIND), tool("now", NOW)])
    assert fits(loose, own, short), "parameters that are not required may be left out"


@pytest.mark.parametrize("form", ["qwen3_coder", "glm45", "minimax_m2", "deepseekv32", "step3"])
def test_texts_are_free_up_to_their_closing_tag(form: str) -> None:
    own = words(form)
    grammar = compiled(form, True, [tool("find", FIND)], "required")
    for value in ("", "two\nlines\n", '"quoted" <b> {x} </', "Zürich 世界 🙂", "null", "12"):
        text = GOOD[form].replace("query>\nx", f"query>\n{value}").replace(">x<", f">{value}<")
        assert fits(grammar, own, text), value
        (call,) = FORMATS.module(form).Parser(TOOLS).parse(text).calls
        trimmed = value.removesuffix("\n") if form == "minimax_m2" else value
        assert json.loads(call.arguments) == {"limit": 3, "query": trimmed}


@pytest.mark.parametrize("form", ["llama3", "pythonic"])
def test_an_answer_in_words_does_not_begin_as_a_call_does(form: str) -> None:
    for special in (False, True):
        grammar, own = compiled(form, special, TOOLS), words(form if special else None)
        lead = FORMATS.module(form).Parser.lead
        assert fits(grammar, own, f"Words {lead} and more.") and fits(grammar, own, "  Words")
        assert not fits(grammar, own, f"{lead}anything") and not fits(grammar, own, f"\n {lead}x")
        marker = FORMATS.module(form).Parser.begins[0]
        end = "<|python_end|>" if form == "pythonic" else ""
        assert fits(grammar, own, f"Words. {marker}{GOOD[form]}{end}")
        assert not fits(grammar, own, f"Words. {marker}{lead}x")


def test_json_that_holds_a_closing_tag_is_read_as_a_whole() -> None:
    schema = {"type": "object", "properties": {"page": {"type": "object"}, "n": {"type": "integer"}}}
    for form, begin, end in (
        ("minimax_m2", '<minimax:tool_call>\n<invoke name="put">\n<parameter name="page">', "</parameter>"),
        ("glm45", "<tool_call>put\n<arg_key>page</arg_key>\n<arg_value>", "</arg_value>"),
    ):
        close = "\n</invoke>\n</minimax:tool_call>" if form == "minimax_m2" else "\n</tool_call>"
        value = {"html": f'a{end}b"{end}', "more": [end]}
        text = f"{begin}{json.dumps(value)}{end}{close}"
        for size in (1, 7, len(text)):
            parser = FORMATS.module(form).Parser([tool("put", schema)])
            events = [event for at in range(0, len(text), size) for event in parser.push(text[at : at + size])]
            (call,) = collect([*events, *parser.finish()]).calls
            assert json.loads(call.arguments) == {"page": value}
        broken = f'{begin}{{"a": "never closed{end}{close}'
        (call,) = FORMATS.module(form).Parser([tool("put", schema)]).parse(broken).calls
        assert json.loads(call.arguments) == {"page": '{"a": "never closed'}


def test_gpt_oss_keeps_reasoning_free_and_calls_strict() -> None:
    own = words("gpt_oss")
    auto, forced = compiled("gpt_oss", True, TOOLS), compiled("gpt_oss", True, TOOLS, "required")
    think = "<|channel|>analysis<|message|>Let me call to=functions.now, hm {<|end|><|start|>assistant"
    final = "<|channel|>final<|message|>It is late."
    call = "<|channel|>commentary to=functions.now <|constrain|>json<|message|>{}<|call|>"
    assert fits(auto, own, think + final) and not fits(forced, own, think + final)
    for grammar in (auto, forced):
        assert fits(grammar, own, think + call) and fits(grammar, own, call)
        assert not fits(grammar, own, think + call.replace("{}", '{"a":1}'))
        for where in ("<|channel|>analysis to=functions.now<|message|>{", " to=functions.now<|channel|>commentary"):
            assert not takes(grammar.matcher(), own, where), where
    assert not fits(forced, own, think), "a forced call must come"
    # In gpt-oss' own vocabulary the end of a call ends the text.
    tokens = [b"<free>" if name == b"<|call|>" else name for name in own.tokens]
    own = dataclasses.replace(own, tokens=[*tokens[:2], b"<|call|>", *tokens[3:]])
    constraint = _base.read_structural_tag((plan(TOOLS, "required", None, "gpt_oss").constraint or ("", ""))[1])
    matcher = ENGINES.module("llguidance").Engine(own, EngineOptions()).compile(constraint).matcher()
    assert takes(matcher, own, call.removesuffix("<|call|>")) and matcher.may_end and matcher.accept([2]) == 1
    assert plan(TOOLS, "auto", None, "gpt_oss").at_once and not plan(TOOLS, "auto", None, "hermes").at_once
    assert not plan([tool("now", NOW, strict=False)], "auto", None, "gpt_oss").at_once


NOT_IN_TAGS: list[tuple[dict[str, Any], str]] = [
    ({"anyOf": [{"required": ["a"]}]}, "anyOf beside the properties"),
    ({"properties": {"a<b": {}}}, "cannot stand in a tag"),
    ({"properties": {"a": {"type": "string", "not": {"const": "x"}}}}, "'a': not cannot be enforced"),
    ({"properties": {"a": {"type": "string", "pattern": "a|^b"}}}, "anchored"),
    ({"properties": {"a": {"type": "string", "pattern": r"\bx"}}}, "border of words"),
    ({"properties": {"a": {"type": "string", "format": "regex"}}}, "format 'regex'"),
    ({"properties": {"a": {"type": "string", "minLength": 99999}}}, "above"),
    ({"properties": {"a": {"oneOf": [{"type": "string", "minLength": 1}, {"type": "string"}]}}}, "several branches"),
    ({"properties": {"a": {"type": "integer", "$ref": "#/properties/b"}}}, "not among its definitions"),
    ({"properties": {"a": False}, "required": ["a"]}, "required and forbidden"),
    ({"properties": {}, "required": ["a"], "additionalProperties": False}, "required and forbidden"),
    ({"properties": {"a": {"type": "string", "enum": [1]}}, "required": ["a"]}, "no value"),
    ({"type": "array"}, "not an object"),
]


# Nor can a grammar of JSON keep to these.
NOT_IN_JSON = ("border of words", "format 'regex'", "several branches", "not among its definitions")


@pytest.mark.parametrize(("schema", "why"), NOT_IN_TAGS)
def test_what_tags_cannot_enforce_is_refused_and_forced_as_json(schema: dict[str, Any], why: str) -> None:
    tools = [tool("now", NOW), tool("f", schema)]
    for form in ("qwen3_coder", "glm45"):
        shown = "of 'f': " if why in NOT_IN_JSON else why
        with pytest.raises(BadRequest, match=shown) as caught:
            plan(tools, "auto", None, form)
        assert caught.value.param == "tools[1].function.parameters" and "'f'" in caught.value.message
        assert plan([tool("f", schema, strict=False)], "auto", None, form).constraint is None
        if why in NOT_IN_JSON:
            with pytest.raises(BadRequest, match=shown):
                plan(tools, "required", None, form)
        else:
            assert plan(tools, "required", None, form).format == "json_array"


def test_names_that_python_does_not_know() -> None:
    for name, schema in (("write-file", NOW), ("f", {"properties": {"class": {}}})):
        with pytest.raises(BadRequest, match="no name in Python"):
            plan([tool(name, schema)], "auto", None, "pythonic")
    with pytest.raises(BadRequest, match="strict tools need a tool-call format"):
        plan(TOOLS, "auto", None, None)
    with pytest.raises(Unspeakable):
        FORMATS.module("json_array").Parser(TOOLS).structure()


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in TEXT_FORMATS])
def test_formats_of_texts_admit_valid_ones(kind: str) -> None:
    schema = {"type": "object", "properties": {"v": {"type": "string", "format": kind}}, "required": ["v"]}
    tools = [tool("f", schema)]
    grammar, own = compiled("glm45", True, tools, "required", parallel=False), words("glm45")
    checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
    seen = 0
    for seed in range(8):
        text = walk(grammar, own, seed, limit=300)
        if text is not None:
            (call,) = FORMATS.module("glm45").Parser(tools).parse(text).calls
            jsonschema.Draft202012Validator(schema, format_checker=checker).validate(json.loads(call.arguments))
            seen += 1
    assert seen


@pytest.mark.slow
@pytest.mark.parametrize("form", ["hermes", "qwen3_coder", "glm45", "step3"])
def test_the_other_engine_takes_them_too(form: str) -> None:
    pytest.importorskip("xgrammar")
    from grammar_support import engine as other

    made = plan([tool("find", STRICT_FIND), tool("now", NOW)], "auto", None, form)
    constraint = _base.read_structural_tag((made.constraint or ("", ""))[1])
    assert other("xgrammar").decline(constraint) is None
    grammar, own, good = other("xgrammar").compile(constraint), words(None), GOOD[form]
    assert fits(grammar, own, good) and fits(grammar, own, "Words.")
    assert not fits(grammar, own, without_query(good)) and not fits(grammar, own, good.replace("find", "mind"))
