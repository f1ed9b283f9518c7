"""Reasoning parsers: the same in any chunks, with the block opened by the prompt, by the model, or not at all."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phloem.text.thinking._base import ThinkingParser
from phloem.utils.registry import Registry

FORMATS = Registry("phloem.text.thinking", "reasoning parser")
WRAPPED = ("ernie45", "hunyuan_a13b", "cohere_command", "cohere_command4")
PLAIN = [name for name in FORMATS.names() if name not in ("gpt_oss", "minimax_append_think", *WRAPPED)]

PIECES = [
    "<think>",
    "</think>",
    "<thi",
    "nk>",
    "◁think▷",
    "◁/think▷",
    "[THINK]",
    "[/THINK]",
    "<tool_call>",
    "<response>",
    "</response>",
    "世",
    "a",
]
PIECES += [
    "<|channel|>",
    "analysis",
    "final",
    "<|message|>",
    "<|end|>",
    "<|start|>",
    "assistant",
    "<|call|>",
    "<|return|>",
]
PIECES += ["\n", "b ", " to=functions.f"]


def parser(form: str, opened: bool | None = None) -> ThinkingParser:
    return FORMATS.module(form).Parser(opened)


def in_chunks(form: str, text: str, opened: bool | None, cuts: list[int]) -> tuple[str, str]:
    made = parser(form, opened)
    edges = [0, *sorted(cuts), len(text)]
    pieces = [made.push(text[begin:end]) for begin, end in zip(edges, edges[1:], strict=False)]  # noqa: RUF007
    pieces.append(made.finish())
    return "".join(piece[0] for piece in pieces), "".join(piece[1] for piece in pieces)


def same(form: str, text: str, opened: bool | None = None) -> tuple[str, str]:
    once = parser(form, opened).parse(text)
    assert in_chunks(form, text, opened, list(range(1, len(text)))) == once, "one character at a time"
    rand = random.Random(len(text))
    for _ in range(4):
        cuts = [rand.randint(0, len(text)) for _ in range(rand.randint(0, 5))]
        assert in_chunks(form, text, opened, cuts) == once, cuts
    return once


@pytest.mark.parametrize("form", PLAIN)
def test_a_block_and_an_answer(form: str) -> None:
    start, end = parser(form).start, parser(form).end
    expected = ("Let me think.\n\nYes, 1 < 2.", "It is 4.\n")
    block = "Let me think.\n\nYes, 1 < 2."
    assert same(form, f"{start}\n{block}\n{end}\n\nIt is 4.\n") == expected
    assert same(form, f"{start}{block}{end}It is 4.\n") == expected
    assert same(form, f"\n{block}\n{end}\n\nIt is 4.\n", opened=True) == expected
    assert same(form, f"{start}{block}{end}It is 4.\n", opened=True) == expected, "some write the marker again"
    assert same(form, "It is 4.\n", opened=False) == ("", "It is 4.\n")


@pytest.mark.parametrize("form", PLAIN)
def test_truncated_inside_the_block(form: str) -> None:
    start, end = parser(form).start, parser(form).end
    assert same(form, f"{start}Hm, let", None) == ("Hm, let", "")
    assert same(form, "Hm, let " + end[:-1], opened=True) == ("Hm, let " + end[:-1], "")
    assert same(form, f"{start}a\n\n") == ("a\n\n", "")
    assert same(form, start[:-1], opened=False) == ("", start[:-1])
    assert same(form, "") == ("", "")


@pytest.mark.parametrize("form", PLAIN)
def test_an_answer_without_a_block(form: str) -> None:
    text = "No thinking here: <b> [x] <thin"
    expected = (text, "") if parser(form).always else ("", text)
    assert same(form, text) == expected
    late = f"First words, then {parser(form).start}no block{parser(form).end}"
    if not parser(form).always:
        assert same(form, late) == ("", late), "a block stands at the beginning"


@pytest.mark.parametrize("form", [form for form in PLAIN if parser(form).jumps])
def test_a_tool_call_ends_the_block(form: str) -> None:
    jump = parser(form).jumps[0]
    assert same(form, f"I need a tool.\n{jump}call", opened=True) == ("I need a tool.", f"{jump}call")


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMATS.names())
@settings(max_examples=60, deadline=None)
@given(
    text=st.lists(st.sampled_from(PIECES), max_size=12).map("".join)
    | st.just("<|channel|>" + "x" * 900 + "<|message|>y"),
    opened=st.sampled_from([None, True, False]),
)
def test_any_text_in_any_chunks(form: str, text: str, opened: bool | None) -> None:
    reasoning, content = same(form, text, opened)
    if not any(mark in text for mark in ("<", "[", "◁", "\n")) and form != "minimax_append_think":
        assert reasoning + content == text


@pytest.mark.parametrize("form", WRAPPED)
def test_content_comes_out_of_its_wrapper(form: str) -> None:
    kind = FORMATS.module(form).Parser
    begin, end = kind.wraps
    text = f"{kind.start}Hm.{kind.end}\n{begin}\nIt is <b>4</b>.\n{end}\n"
    assert same(form, text) == ("Hm.", "It is <b>4</b>.\n")
    assert same(form, f"{kind.start}Hm.{kind.jumps[0]}x") == ("Hm.", f"{kind.jumps[0]}x")


def test_ernie_unwraps_its_response() -> None:
    text = "Hm.\n</think>\n\n<response>\nIt is 4.\n\nReally.\n</response>\n"
    assert same("ernie45", text) == ("Hm.", "It is 4.\n\nReally.\n")
    assert same("ernie45", "Hm.</think>\n\n<tool_call>x") == ("Hm.", "<tool_call>x")
    assert same("ernie45", "<resp", opened=False) == ("", "<resp")


def test_minimax_append_think_adds_the_tag() -> None:
    assert same("minimax_append_think", "Hm.</think>4") == ("", "<think>Hm.</think>4")
    assert same("minimax_append_think", "") == ("", "")


def test_harmony_channels() -> None:
    text = (
        "<|channel|>analysis<|message|>Think 1 < 2.<|end|><|start|>assistant<|channel|>commentary<|message|>I will "
        "look.<|end|><|start|>assistant<|channel|>final<|message|>It is 4.<|return|>"
    )
    assert same("gpt_oss", text) == ("Think 1 < 2.", "I will look.It is 4.")
    call = "<|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>{}<|call|>"
    assert same("gpt_oss", "<|channel|>analysis<|message|>a<|end|>" + call) == ("a", call)
    assert same("gpt_oss", "more<|end|><|start|>assistant<|channel|>final<|message|>x", opened=True) == ("more", "x")
    assert same("gpt_oss", "plain text") == ("", "plain text")
    assert same("gpt_oss", "<|channel|>final<|mess") == ("", "<|channel|>final<|mess")


def test_reasoning_streams_at_once() -> None:
    made = parser("qwen3")
    sent = [made.push(char) for char in "<think>\nabc\n\nd</think>\n\nOK"]
    assert [piece[0] for piece in sent if piece[0]] == ["a", "b", "c", "\n\nd"]
    assert "".join(piece[1] for piece in sent) == "OK"
    assert not made.inside and parser("deepseek_r1").inside
