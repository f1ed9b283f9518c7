"""A constrained answer waits for the end of the model's reasoning, in the notation of the model's format."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from phloem.core.errors import BadRequest
from phloem.core.request import SamplingParams
from phloem.server.info import ModelInfo
from phloem.server.parsers import THINKING
from phloem.server.reasoning import resolve_thinking, thinking_gate
from phloem.server.request import Item
from phloem.testing.byte_tokenizer import ByteTokenizer

TOKENIZER: Any = ByteTokenizer()
INFO = replace(ModelInfo("m", "m", 300, 1000), reasoning_parser="qwen3")


def test_what_the_prompt_says_decides() -> None:
    opened = thinking_gate("qwen3", TOKENIZER, "user: x\nassistant: <think>\n")
    assert opened is not None and opened.opened and opened.end_text == "</think>"
    assert thinking_gate("qwen3", TOKENIZER, "assistant: <think>\n\n</think>\n\n") is None
    maybe = thinking_gate("qwen3", TOKENIZER, "assistant: ")
    assert maybe is not None and not maybe.opened and bytes(maybe.start) == b"<think>"
    always = thinking_gate("deepseek_r1", TOKENIZER, "assistant: ")
    assert always is not None and always.opened
    harmony = thinking_gate("gpt_oss", TOKENIZER, "<|start|>assistant")
    assert harmony is not None and harmony.opened and bytes(harmony.end) == b"<|channel|>final<|message|>"


def test_a_continued_answer_counts() -> None:
    inside = thinking_gate("qwen3", TOKENIZER, "assistant: <think>Well", "<think>Well")
    assert inside is not None and inside.opened
    assert thinking_gate("qwen3", TOKENIZER, "assistant: <think>a</think>{", "<think>a</think>{") is None


@pytest.mark.parametrize("name", THINKING.names())
def test_every_format_has_a_gate(name: str) -> None:
    gate = thinking_gate(name, TOKENIZER, "assistant: ")
    assert gate is not None and gate.end and (gate.opened or gate.start)


def test_only_constrained_items_that_ask_get_one() -> None:
    constraint = SamplingParams(regex="a")
    asked = Item(constraint, text="assistant: <think>", reasoning=True)
    ids = Item(constraint, ids=list(b"assistant: <think>"), reasoning=True)
    for item in (asked, ids):
        resolve_thinking(item, TOKENIZER, INFO)
        assert item.thinking is not None and item.thinking.opened
    for item in (Item(SamplingParams(), text="x", reasoning=True), Item(constraint, text="x")):
        resolve_thinking(item, TOKENIZER, INFO)
        assert item.thinking is None
    with pytest.raises(BadRequest, match="no known reasoning format"):
        resolve_thinking(asked, TOKENIZER, replace(INFO, reasoning_parser=None))
