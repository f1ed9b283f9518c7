"""Both engines: the rollback law, agreement token by token, structural tags, and hostile grammars."""

from __future__ import annotations

import json
import random
import resource
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from grammar_support import allowed, engine, vocabulary, walk

from phloem.core.errors import BadRequest
from phloem.grammar import _base
from phloem.grammar._base import Choice, Ebnf, JsonSchema, Lark, Regex, Union

NAMES = ["llguidance", "xgrammar"]

EXPRESSION = """root ::= term (("+" | "-") term)*
term ::= factor (("*" | "/") factor)*
factor ::= [0-9]+ | "(" root ")"
"""
LIST = 'root ::= "[" (item ("," item)*)? "]"\nitem ::= [a-z]+ | root\n'
FIXED = 'root ::= "key: " ("alpha" | "alphabet" | "beta") "\\n" [0-9]{2,4}'
RECORD = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["alpha", "alphabet", "beta"]},
        "level": {"type": "integer", "minimum": 10, "maximum": 250},
        "flags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    },
    "required": ["kind", "level", "flags"],
    "additionalProperties": False,
}
BOTH: dict[str, Any] = {
    "regex": Regex("(ab|ba){2,5}c?[0-9]*"),
    "regex classes": Regex(r"[A-Z][a-z]+( [A-Z][a-z]+)*"),
    "regex unicode": Regex("[à-ü]{1,6}(→|←)?"),
    "expression": Ebnf(EXPRESSION),
    "list": Ebnf(LIST),
    "fixed": Ebnf(FIXED),
    "choice": Choice(("yes", "no", "yes, but", 'a "quoted" one')),
    "record": JsonSchema(json.dumps(RECORD)),
    "union": Union((Choice(("none",)), Regex("[0-9]{3}"))),
}


@pytest.mark.some(18)
@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", BOTH)
def test_rollback_law(name: str, kind: str, seed: int) -> None:
    """Accept, roll back by any number, and every answer is what it was."""
    compiled = engine(name).compile(BOTH[kind])
    rng = random.Random(f"{kind} {seed}")
    ids, _ = walk(compiled.matcher(), seed, limit=40)
    matcher = compiled.matcher()
    seen: list[Any] = []
    for token in ids:
        seen.append((allowed(matcher), matcher.jump(), matcher.may_end, matcher.done))
        matcher.accept([token])
    place = len(ids)
    while place > 0:
        back = rng.randint(1, place)
        matcher.rollback(back)
        place -= back
        mask, jump, may_end, done = seen[place]
        assert np.array_equal(allowed(matcher), mask)
        assert (matcher.jump(), matcher.may_end, matcher.done) == (jump, may_end, done)
        ahead = rng.randint(0, back // 2)
        assert matcher.accept(ids[place : place + ahead]) == ahead
        place += ahead


@pytest.mark.slow
@pytest.mark.parametrize("kind", BOTH)
def test_the_engines_agree_token_by_token(kind: str) -> None:
    """What one mask allows the other engine takes, and what neither allows both refuse.

    The masks themselves differ where a text is forced: llguidance then allows its one canonical token alone; and
    xgrammar leaves out some tokens that end several rules at once. Neither is a difference of what texts are valid.
    """
    first, second = (engine(name).compile(BOTH[kind]) for name in NAMES)
    rng = random.Random(kind)
    for seed in range(4):
        driver = first if seed % 2 else second
        a, b = first.matcher(), second.matcher()
        ids, _ = walk(driver.matcher(), seed, limit=60)
        for token in ids:
            here, there = allowed(a), allowed(b)
            for one, mask, other in ((a, there & ~here, here), (b, here & ~there, there)):
                assert other.any()
                for wanted in _some(rng, mask):
                    assert takes(one, wanted), vocabulary().tokens[wanted]
            for foreign in _some(rng, ~(here | there)[: vocabulary().size]):
                assert not takes(a, foreign) and not takes(b, foreign), vocabulary().tokens[foreign]
            assert a.may_end == b.may_end
            assert a.accept([token]) == b.accept([token]) == 1
        assert a.may_end == b.may_end


def _some(rng: random.Random, mask: Any) -> list[int]:
    options = np.flatnonzero(mask).tolist()
    return rng.sample(options, min(6, len(options)))


def takes(matcher: Any, token: int) -> bool:
    taken = matcher.accept([token])
    matcher.rollback(taken)
    return taken == 1


@pytest.mark.parametrize("name", NAMES)
def test_jump_is_forced_and_canonical(name: str) -> None:
    words = vocabulary()
    for kind in BOTH:
        compiled = engine(name).compile(BOTH[kind])
        for seed in range(3):
            matcher = compiled.matcher()
            ids, _ = walk(compiled.matcher(), seed, limit=40)
            for place, token in enumerate(ids):
                forced = matcher.jump()
                text = words.text_of(forced)
                assert matcher.accept(forced) == len(forced)
                matcher.rollback(len(forced))
                rest = words.text_of(ids[place:])
                assert rest.startswith(text[: len(rest)]), "a walk went another way than what was called forced"
                if place == 0 and forced:
                    assert words.encode(text.decode())[: len(forced)] == forced
                matcher.accept([token])


@pytest.mark.parametrize("name", NAMES)
def test_end_of_text_is_taken_once_and_rolled_back(name: str) -> None:
    matcher = engine(name).compile(Choice(("yes",))).matcher()
    ids = [*vocabulary().encode("yes"), 2]
    assert matcher.accept(ids) == len(ids) and matcher.done
    assert set(np.flatnonzero(allowed(matcher))) == {0, 2}
    matcher.rollback(1)
    assert matcher.done and matcher.may_end
    matcher.rollback(len(ids) - 1)
    assert not matcher.may_end and matcher.accept(vocabulary().encode("no")) == 0


def test_lark() -> None:
    grammar = 'start: "a" NUMBER ("," NUMBER)*\nNUMBER: /[0-9]{1,3}/\n'
    matcher = engine("llguidance").compile(Lark(grammar)).matcher()
    ids = vocabulary().encode("a1,22,333")
    assert matcher.accept(ids) == len(ids) and matcher.may_end
    assert engine("xgrammar").decline(Lark(grammar))


def structural(**more: Any) -> str:
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    tags = [
        {"begin": f"<fn={name}>", "content": {"type": "json_schema", "json_schema": schema}, "end": "</fn>"}
        for name in ("add", "sub")
    ]
    shape = {"type": "triggered_tags", "triggers": ["<fn="], "tags": tags, **more}
    return json.dumps({"type": "structural_tag", "format": shape})


def accepts(name: str, constraint: Any, text: str) -> bool:
    matcher = engine(name).compile(constraint).matcher()
    ids = vocabulary().encode(text)
    return matcher.accept(ids) == len(ids) and matcher.may_end


@pytest.mark.parametrize("name", NAMES)
def test_structural_tags(name: str) -> None:
    tag = _base.read_structural_tag(structural())
    call = '<fn=add>{"n":1}</fn>'
    for text in ("just text", "say " + call, call + " and <fn=sub>" + '{"n":22}</fn> done', "a < b"):
        assert accepts(name, tag, text), text
    for text in ("<fn=mul>", '<fn=add>{"n":"x"}', '<fn=add>{"n":1}</fn', '<fn=add>{ "n":1}'):
        assert not accepts(name, tag, text), text
    matcher = engine(name).compile(tag).matcher()
    matcher.accept(vocabulary().encode("well <fn=add>"))
    assert vocabulary().text_of(matcher.jump()).startswith(b'{"')


@pytest.mark.parametrize("name", NAMES)
def test_structural_tags_that_must_call_or_end_with_the_first(name: str) -> None:
    call = '<fn=add>{"n":1}</fn>'
    must = _base.read_structural_tag(structural(at_least_one=True))
    assert accepts(name, must, call) and not accepts(name, must, "no call")
    assert accepts(name, must, call + " and " + call) and not accepts(name, must, "first words " + call)
    once = _base.read_structural_tag(structural(at_least_one=True, stop_after_first=True))
    assert accepts(name, once, call) and not accepts(name, once, call + "x") and not accepts(name, once, call + call)


def test_old_spelling_of_structural_tags() -> None:
    body = {"structures": [{"begin": "<f>", "schema": {"type": "null"}, "end": "</f>"}], "triggers": ["<f"]}
    tag = _base.read_structural_tag(json.dumps(body))
    assert accepts("llguidance", tag, "x<f>null</f>y") and not accepts("llguidance", tag, "<f>1</f>")


def test_a_trigger_may_be_a_special_token() -> None:
    words = vocabulary()
    name, token = next((text, token) for text, token in words.special_by_text.items() if text == "<repo_name>")
    tag = _base.StructuralTag((name,), (_base.Tag(name, Regex("[0-9]+"), "!"),))
    matcher = engine("llguidance").compile(tag).matcher()
    ids = [*words.encode("text "), token, *words.encode("42!")]
    assert allowed(matcher)[token]
    assert matcher.accept(ids) == len(ids) and matcher.may_end
    assert "special token" in (engine("xgrammar").decline(tag) or "")


@pytest.mark.parametrize("required", [True, False])
def test_special_tokens_inside_a_tag_are_those_tokens(required: bool) -> None:
    words = vocabulary()
    token = words.special_by_text["<repo_name>"]
    begin, end = "<repo_name>f<repo_name>", "!<repo_name>"
    tag = _base.StructuralTag(("<repo_name>",), (_base.Tag(begin, Regex("[0-9]+"), end),), at_least_one=required)
    matcher = engine("llguidance").compile(tag).matcher()
    ids = [token, *words.encode("f"), token, *words.encode("42!"), token]
    assert matcher.accept(ids) == len(ids) and matcher.may_end
    assert "special token" in (engine("xgrammar").decline(tag) or "")


def test_special_tokens_in_free_text_and_at_the_head_of_triggers() -> None:
    words = vocabulary()
    head, other = words.special_by_text["<repo_name>"], words.special_by_text["<file_sep>"]
    plain = _base.StructuralTag(("<fn=",), (_base.Tag("<fn=a>", Regex("[0-9]+"), "!"),))
    encode = words.encode
    for tag in (plain, _base.StructuralTag(("<repo_name>go",), (_base.Tag("<repo_name>go:", Regex("[0-9]+"), "!"),))):
        compiled = engine("llguidance").compile(tag)
        ids = [*encode("some"), other, *encode("text"), other]
        matcher = compiled.matcher()
        assert matcher.accept(ids) == len(ids) and matcher.may_end
    for text, fits in (("go:42!", True), ("go:42! and more", True), ("goat", False), ("stay", True), ("g", True)):
        for before in ([], encode("first "), [other]):
            matcher = compiled.matcher()
            ids = [*before, head, *encode(text)]
            assert (matcher.accept(ids) == len(ids) and matcher.may_end) == fits, text
    must = _base.StructuralTag(tag.triggers, tag.tags, at_least_one=True, stop_after_first=True)
    matcher = engine("llguidance").compile(must).matcher()
    assert np.flatnonzero(allowed(matcher)).tolist() == [head]
    ids = [head, *encode("go:42!")]
    assert matcher.accept(ids) == len(ids) and matcher.done


def test_other_formats_are_read_by_one_engine() -> None:
    shape = {
        "type": "sequence",
        "elements": [
            {"type": "const_string", "value": "answer: "},
            {"type": "json_schema", "json_schema": {"type": "integer", "minimum": 3, "maximum": 5}},
        ],
    }
    tag = _base.read_structural_tag(json.dumps({"type": "structural_tag", "format": shape}))
    for name in NAMES:
        assert accepts(name, tag, "answer: 4") and not accepts(name, tag, "answer: 9")
    shape["elements"][1] = {"type": "repeat", "min": 2, "max": 2, "content": {"type": "const_string", "value": "ab"}}
    tag = _base.read_structural_tag(json.dumps({"type": "structural_tag", "format": shape}))
    assert engine("llguidance").decline(tag)
    assert accepts("xgrammar", tag, "answer: abab") and not accepts("xgrammar", tag, "answer: ab")
    shape["elements"][1]["content"] = {"type": "json_schema", "json_schema": {"uniqueItems": True}}
    with pytest.raises(BadRequest, match="uniqueItems"):
        engine("xgrammar").compile(_base.read_structural_tag(json.dumps({"format": shape})))


@pytest.mark.parametrize("keyword", ["allOf", "uniqueItems", "not", "const", "patternProperties", "pattern"])
def test_xgrammar_declines_schemas_it_does_not_enforce(keyword: str) -> None:
    value: Any = {"allOf": [{}], "uniqueItems": True, "not": {}, "const": 1, "patternProperties": {}, "pattern": "a"}
    assert keyword in (engine("xgrammar").decline(JsonSchema(json.dumps({keyword: value[keyword]}))) or "")


HOSTILE: dict[str, Any] = {
    "nested plus": Regex("((((a+)+)+)+)+b"),
    "doubled": Regex("(x+x+)+y"),
    "counted dots": Regex("(.*a){30}"),
    "exponential automaton": Regex("[ab]*a[ab]{300}"),
    "nested counts": Regex("((((((a?){20}){20}){20}){20}){20}){20}"),
    "huge count": Regex("a{9999}"),
    "counted classes": Regex(r"\w{500}@\w{500}"),
    "wide count": Regex("(.|\n){0,4000}x"),
    "look-ahead": Regex("(?=a)b"),
    "back-reference": Regex(r"(a)\1"),
    "empty alternatives": Regex("(|||)*"),
    "ambiguous": Ebnf('root ::= s\ns ::= s s s | "b" | ""\n'),
    "left recursion": Ebnf('root ::= root "a" | "a"\n'),
    "no end": Ebnf('root ::= "a" root\n'),
    "undefined": Ebnf("root ::= x\n"),
    "no root": Ebnf('a ::= "b"\n'),
    "unclosed": Ebnf('root ::= "a\n'),
    "ambiguous lark": Lark('start: s\ns: s s s | "b" | ""\n'),
    "endless lark": Lark('start: "a" start\n'),
    "wrong lark": Lark("start: x\n"),
    "many items": JsonSchema('{"type": "array", "minItems": 9000, "maxItems": 9999}'),
    "long string": JsonSchema('{"type": "string", "minLength": 100000, "maxLength": 900000}'),
    "reference bomb": JsonSchema(
        json.dumps(
            {
                "$defs": {
                    "a0": {"type": "integer"},
                    **{f"a{i + 1}": {"allOf": [{"$ref": f"#/$defs/a{i}"}] * 2} for i in range(25)},
                },
                "$ref": "#/$defs/a25",
            }
        )
    ),
    "product of alternatives": JsonSchema(
        json.dumps(
            {
                "allOf": [
                    {"anyOf": [{"properties": {f"k{i}_{j}": {"type": "integer"}}} for j in range(4)]} for i in range(9)
                ]
            }
        )
    ),
    "many words": JsonSchema(json.dumps({"enum": [f"word {i}" for i in range(9000)]})),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.slow if kind == "wide count" else ()) for kind in HOSTILE]
)
def test_hostile_grammars_end_in_a_grammar_or_a_clear_error(name: str, kind: str) -> None:
    constraint = HOSTILE[kind]
    if engine(name).decline(constraint):
        return
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.thread_time()
    try:
        matcher = engine(name).compile(constraint).matcher()
        mask = vocabulary().new_mask()
        for step in range(15):
            matcher.fill(mask)
            options = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")[: vocabulary().size])
            assert len(options)
            matcher.accept([int(options[step % len(options)])])
    except BadRequest as error:
        assert len(error.message) > 15 and "\n" not in error.message
    assert time.thread_time() - start < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 600_000, "kB"


@pytest.mark.parametrize("seed", range(40))
def test_fuzzed_regexes_and_schemas(seed: int) -> None:
    rng = random.Random(seed)
    pieces = [
        "a",
        "b*",
        "(",
        ")",
        "|",
        "[",
        "]",
        "+",
        "?",
        "{2,9}",
        "{",
        ".",
        "\\",
        "^",
        "$",
        "\\d",
        "é",
        "(?i)",
        "-",
        "/",
    ]
    pattern = "".join(rng.choice(pieces) for _ in range(rng.randint(1, 25)))
    keys = ["type", "items", "properties", "anyOf", "oneOf", "allOf", "enum", "$ref", "minItems", "pattern", "required"]

    def value(depth: int) -> Any:
        if depth == 0 or rng.random() < 0.3:
            return rng.choice([None, True, 3, -1, "string", "object", "#/items", ["a"], [], {}, 1.5, "#", "integer"])
        if rng.random() < 0.3:
            return [value(depth - 1) for _ in range(rng.randint(0, 3))]
        return {rng.choice(keys): value(depth - 1) for _ in range(rng.randint(0, 4))}

    for constraint in (Regex(pattern), JsonSchema(json.dumps(value(4))), Lark(pattern), Ebnf(f"root ::= {pattern}")):
        try:
            matcher = engine("llguidance").compile(constraint).matcher()
            assert allowed(matcher).any()
        except BadRequest as error:
            assert error.message


@pytest.mark.slow
def test_a_compilation_that_takes_too_long_is_killed_and_the_next_one_works() -> None:
    process = engine("xgrammar")._process
    with pytest.raises(BadRequest, match="within"):
        process.compile("regex", r"(\w{600}@){8}", "compact", timeout=0.02)
    with pytest.raises(BadRequest, match=r"not usable: .*line 1.*not defined"):
        process.compile("ebnf", "root ::= x", "compact", timeout=10)


def test_copies_of_one_grammar_are_independent_across_threads() -> None:
    """The runner's and the scheduler's cursors move at the same time."""
    compiled = engine("llguidance").compile(JsonSchema(json.dumps(RECORD)))
    paths = [walk(compiled.matcher(), seed, limit=40)[0] for seed in range(8)]

    def follow(ids: list[int]) -> list[bytes]:
        matcher = compiled.matcher()
        masks: list[bytes] = []
        for token in ids:
            masks.append(allowed(matcher).tobytes())
            matcher.jump()
            assert matcher.accept([token]) == 1
        return masks

    expected = [follow(ids) for ids in paths]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            assert list(pool.map(follow, paths)) == expected
