"""The pool, the cache, limits and what the scheduler holds of a constrained request."""

from __future__ import annotations

import dataclasses
import json
import threading
import time
from typing import Any

import numpy as np
import pytest
from grammar_support import vocabulary

from phloem.core.errors import BadRequest, ConfigError, PhloemError
from phloem.core.late import Prepared
from phloem.core.messages import Submit, pack_ids
from phloem.core.request import SamplingParams
from phloem.grammar import _base
from phloem.grammar._manager import Compiling, GrammarManager, GrammarSettings
from phloem.grammar._thinking import Channel, ThinkingMarkers

pytest.importorskip("llguidance")

LONG_KEYS = {
    "type": "object",
    "properties": {"the_first_long_property": {"type": "integer"}, "another_long_property": {"type": "boolean"}},
    "required": ["the_first_long_property", "another_long_property"],
    "additionalProperties": False,
}


@pytest.fixture
def manager() -> Any:
    made = GrammarManager(vocabulary())
    yield made
    made.close()


def submit(**params: Any) -> Submit:
    logprob = params.pop("return_logprob", False)
    return Submit(id="r", input_ids=pack_ids([1]), sampling=SamplingParams(**params), return_logprob=logprob)


class Held:
    """A constrained request as scheduler and runner hold it."""

    def __init__(self, made: Prepared | None) -> None:
        assert made is not None
        (late,) = made.waits
        assert isinstance(late, Compiling)
        self.late, self.made = late, made.constraint
        self.ready = late.ready
        self._follower: Any = None

    @property
    def error(self) -> PhloemError | None:
        return self.late.error

    @property
    def constraint(self) -> Any:
        assert self.made is not None
        return self.made

    def admit(self, output: list[int]) -> None:
        self._follower = self.constraint.follower(output)

    def masks(self, sampled: list[int], drafts: list[int]) -> list[Any]:
        if self._follower is None:
            self.admit([])
        return self._follower.masks(sampled, drafts)

    def mask(self, sampled: list[int]) -> Any:
        (mask,) = self.masks(sampled, [])
        return mask

    def jump(self, output: list[int]) -> list[int]:
        return self.constraint.jump(output)


def prepared(manager: GrammarManager, prompt: tuple[int, ...] = (1,), **params: Any) -> Held:
    made = Held(manager.prepare(submit(**params), list(prompt)))
    wait(made)
    return made


def wait(made: Held) -> None:
    end = time.monotonic() + 20
    while not made.ready():
        assert time.monotonic() < end
        time.sleep(0.001)


def bits(mask: np.ndarray) -> set[int]:
    assert mask.dtype == np.int32 and len(mask) == vocabulary().mask_words
    return set(np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist())


def allowed(made: Held, sampled: list[int]) -> set[int]:
    return bits(made.mask(sampled))


def encode(text: str) -> list[int]:
    return vocabulary().encode(text)


def test_unconstrained_requests_have_nothing(manager: GrammarManager) -> None:
    assert manager.prepare(submit(), [1]) is None


def test_a_request_is_followed_token_by_token(manager: GrammarManager) -> None:
    made = prepared(manager, regex="(abc|abd)+x?")
    made.admit([])
    assert made.error is None and made.late.engine == "llguidance"
    first = allowed(made, [])
    assert encode("a")[0] in first and encode("b")[0] not in first and 2 not in first
    for token in encode("ab"):
        after = allowed(made, [token])
    assert {vocabulary().tokens[token][:1] for token in after} == {b"c", b"d"}
    assert 2 in allowed(made, encode("c"))
    assert allowed(made, encode("x")) == {0, 2}
    assert allowed(made, [2]) == {0, 2}, "with ignore_eos the end is repeated"
    assert allowed(made, [2]) == {0, 2}


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["llguidance", "xgrammar"])
def test_padding_of_the_logits_is_never_allowed(backend: str) -> None:
    pytest.importorskip(backend)
    words = vocabulary()
    padded = dataclasses.replace(words, size=words.size + 1000)
    manager = GrammarManager(padded, GrammarSettings(backend=backend))
    made = prepared(manager, regex=".*")
    mask = made.mask([])
    assert mask is not None and len(mask) == padded.mask_words
    found = np.unpackbits(mask.view(np.uint8), bitorder="little")
    assert found[: words.size].any() and not found[words.size :].any()
    manager.close()


def test_a_token_that_does_not_fit_fails_the_request_alone(manager: GrammarManager) -> None:
    made, other = prepared(manager, regex="[0-9]+"), prepared(manager, regex="[0-9]+")
    allowed(made, [])
    with pytest.raises(PhloemError, match="does not fit") as caught:
        made.mask(encode("hello"))
    assert caught.value.status == 500, "the mask should have kept it out: no fault of the client's"
    assert encode("7")[0] in allowed(other, encode("3"))


def test_a_preempted_request_goes_on_where_it_was(manager: GrammarManager) -> None:
    made = prepared(manager, json_schema=json.dumps(LONG_KEYS))
    made.admit([])
    ids = encode('{"the_first_long_property":1')
    allowed(made, [])
    for token in ids:
        last = allowed(made, [token])
    made.admit(ids[:-3])
    assert allowed(made, []) == allowed_after(manager, ids[:-3])
    made.admit(ids)
    assert allowed(made, []) == last


def allowed_after(manager: GrammarManager, ids: list[int]) -> set[int]:
    fresh = prepared(manager, json_schema=json.dumps(LONG_KEYS))
    fresh.admit(ids)
    return allowed(fresh, [])


def test_min_new_tokens_is_kept_as_far_as_the_grammar_goes_on(manager: GrammarManager) -> None:
    made = prepared(manager, regex="a{1,4}", min_new_tokens=3)
    one = encode("a")
    allowed(made, [])
    assert 2 not in allowed(made, one)
    assert 2 not in allowed(made, one)
    assert 2 in allowed(made, one)
    short = prepared(manager, regex="a", min_new_tokens=3)
    allowed(short, [])
    assert allowed(short, one) == {0, 2}


def test_jump_gives_the_tokens_the_model_would_use(manager: GrammarManager) -> None:
    made = prepared(manager, json_schema=json.dumps(LONG_KEYS))
    forced = made.jump([])
    text = '{"the_first_long_property":'
    assert len(forced) >= 8
    assert encode(text)[: len(forced)] == forced
    output = encode(text + '7,"')
    more = made.jump(output)
    assert vocabulary().text_of(more).startswith(b"another_long_property")
    assert encode(vocabulary().text_of([*output, *more]).decode()) == [*output, *more]


def test_jump_ends_the_text(manager: GrammarManager) -> None:
    made = prepared(manager, json_schema=json.dumps(LONG_KEYS))
    output = encode('{"the_first_long_property":7,"another_long_property":true')
    assert [*vocabulary().text_of(made.jump(output)[:-1])] == [ord("}")]
    assert made.jump(output)[-1] == 2
    loop = prepared(manager, json_schema=json.dumps(LONG_KEYS), ignore_eos=True)
    assert vocabulary().text_of(loop.jump(output)) == b"}" and 2 not in loop.jump(output)


def test_masks_go_on_after_a_jump(manager: GrammarManager) -> None:
    made = prepared(manager, json_schema=json.dumps(LONG_KEYS))
    made.admit([])
    first = next(iter(allowed(made, []) & set(encode('{"'))))
    forced = made.jump([first])
    made.constraint.advance([first, *forced])
    after = allowed(made, [first])
    assert after == allowed_after(manager, [first, *forced])


def test_jump_keeps_to_the_length_limit_and_to_its_switch(manager: GrammarManager) -> None:
    short = prepared(manager, json_schema=json.dumps(LONG_KEYS), max_new_tokens=5)
    assert len(short.jump([])) == 5
    scored = prepared(manager, json_schema=json.dumps(LONG_KEYS), return_logprob=True)
    assert not scored.constraint.can_jump and scored.jump([]) == []
    off = GrammarManager(vocabulary(), GrammarSettings(jump_forward=False))
    assert prepared(off, json_schema=json.dumps(LONG_KEYS)).jump([]) == []
    off.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("params", "word"),
    [
        ({"json_schema": "{"}, "json_schema: not valid JSON"),
        ({"json_schema": '{"not": {}}'}, "#/not"),
        ({"regex": "("}, "unclosed group"),
        ({"regex": "a{99999999}"}, "repetition"),
        ({"regex": "a" * 300_000}, "at most"),
        ({"structural_tag": "[]"}, "structural_tag: expected"),
        ({"structural_tag": '{"structures": [{"begin": "<a>"}], "triggers": ["<"]}'}, "#/structures/0"),
        ({"structural_tag": '{"structures": [{"begin": "x", "end": ""}], "triggers": ["<"]}'}, "no trigger"),
        ({"regex": "[^\\x00-\\U0010ffff]"}, "no text"),
    ],
)
def test_errors_are_the_requests_own(manager: GrammarManager, params: dict[str, str], word: str) -> None:
    made = prepared(manager, **params)
    assert made.error is not None and word in made.error.message and made.error.status == 400


def test_times_of_compilations_are_told_once(manager: GrammarManager) -> None:
    manager.take_compile_seconds()
    prepared(manager, regex="[0-9]{3}x")
    (seconds,) = manager.take_compile_seconds()
    assert seconds > 0 and manager.take_compile_seconds() == []


def test_equal_constraints_compile_once(manager: GrammarManager, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = manager.engine("llguidance")
    calls: list[Any] = []
    compile = engine.compile
    monkeypatch.setattr(engine, "compile", lambda constraint: calls.append(constraint) or compile(constraint))
    for made in [Held(manager.prepare(submit(regex="ab*"), [1])) for _ in range(5)]:
        wait(made)
    assert len(calls) == 1
    prepared(manager, regex="ab+")
    assert len(calls) == 2


def test_the_cache_forgets_what_was_not_used_longest() -> None:
    manager = GrammarManager(vocabulary(), GrammarSettings(cache_entries=3))
    for index in range(6):
        kept = prepared(manager, regex=f"a{{{index + 1}}}")
        prepared(manager, regex="b")
    assert len(manager._cache) <= 3
    assert _base.fingerprint(_base.Regex("b")) in manager._cache
    assert kept.jump([]) is not None, "what is in use lives on"
    manager.close()


class SlowEngine:
    """Compiles when told to."""

    name = "slow"

    def __init__(self) -> None:
        self.gate = threading.Event()

    def decline(self, constraint: Any) -> None:
        return None

    def compile(self, constraint: Any) -> Any:
        self.gate.wait(10)
        raise BadRequest("done")

    def close(self) -> None:
        self.gate.set()


@pytest.mark.slow
def test_time_limit_and_bounded_queue() -> None:
    manager = GrammarManager(vocabulary(), GrammarSettings(compile_timeout=0.01, workers=1, max_pending=2))
    slow = SlowEngine()
    manager._engines["llguidance"] = slow
    first = Held(manager.prepare(submit(regex="a"), [1]))
    second = Held(manager.prepare(submit(regex="b"), [1]))
    third = Held(manager.prepare(submit(regex="c"), [1]))
    assert not first.ready() and first.error is None
    assert third.ready() and third.error is not None and third.error.status == 503
    end = time.monotonic() + 5
    while not first.ready() and time.monotonic() < end:
        time.sleep(0.01)
    assert isinstance(first.error, BadRequest) and "within" in first.error.message
    assert first.error.param and first.error.message.startswith(f"{first.error.param}: ")
    assert not second.ready(), "its own time has not begun"
    manager.close()


def test_a_pinned_engine_and_its_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="llguidance, xgrammar"):
        GrammarManager(vocabulary(), GrammarSettings(backend="llguidence"))
    manager = GrammarManager(vocabulary(), GrammarSettings(backend="llguidance"))
    tag = {"type": "structural_tag", "format": {"type": "any_tokens"}}
    made = prepared(manager, structural_tag=json.dumps(tag))
    assert made.error is not None and "llguidance: reads no structural tag of this shape" in made.error.message
    assert set(manager.decisions().values()) == {"llguidance"}
    monkeypatch.setitem(manager._engines, "llguidance", BrokenEngine())
    broken = prepared(manager, regex="new")
    assert broken.error is not None and "KeyError" in broken.error.message
    manager.close()


class BrokenEngine(SlowEngine):
    def compile(self, constraint: Any) -> Any:
        raise KeyError("a defect")


def test_a_grammar_that_becomes_too_slow_ends_its_request(
    manager: GrammarManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = prepared(manager, regex="[a-z]+")
    monkeypatch.setattr("phloem.grammar._follow._SLOW_MASK", -1.0)
    with pytest.raises(BadRequest, match="too slow"):
        made.mask([])


START, END = 3, 4


def thinking_manager() -> GrammarManager:
    return GrammarManager(vocabulary(), GrammarSettings(thinking=ThinkingMarkers((START,), (END,))))


def test_the_grammar_waits_for_the_end_of_thinking() -> None:
    manager = thinking_manager()
    made = prepared(manager, prompt=(1, START), regex="[0-9]+")
    free = allowed(made, [])
    assert len(free) == vocabulary().size - len(vocabulary().eos_ids) and not free & {0, 2}
    assert allowed(made, encode("hm")) == free
    assert made.jump(encode("hm")) == []
    bound = allowed(made, [END])
    assert {vocabulary().tokens[token][:1] for token in bound} <= {bytes([48 + digit]) for digit in range(10)}
    manager.close()


def test_a_model_may_open_a_block_and_a_closed_one_is_over() -> None:
    manager = thinking_manager()
    maybe = prepared(manager, prompt=(1, START, END, 50, 51, 52, 53), regex="[0-9]+")
    first = allowed(maybe, [])
    assert START in first and encode("7")[0] in first and encode("x")[0] not in first
    assert encode("x")[0] in allowed(maybe, [START])
    answers = prepared(manager, prompt=(1, 50, 51), regex="[0-9]+")
    allowed(answers, [])
    assert START not in allowed(answers, encode("7"))
    over = prepared(manager, prompt=(1, START, END), regex="[0-9]+")
    assert START not in allowed(over, [])
    manager.close()


def test_what_could_have_opened_a_block_counts_as_the_grammars_text() -> None:
    opening = tuple(encode("<th>"))
    assert len(opening) > 1
    markers = ThinkingMarkers(opening, (END,), end_text="</th>")
    manager = GrammarManager(vocabulary(), GrammarSettings(thinking=markers))
    plain = prepared(manager, regex="[0-9]+")
    assert {opening[0], encode("7")[0]} <= allowed(plain, [])
    assert allowed(plain, [opening[0]]) == {opening[1]}, "no number begins with it: a block it must be"
    tag = prepared(manager, regex="<a>[0-9]")
    allowed(tag, [])
    assert allowed(tag, [opening[0]]) >= {opening[1], encode("a")[0]}
    for token in encode("a>"):
        bound = allowed(tag, [token])
    assert encode("7")[0] in bound and opening[1] not in bound
    tag.admit(encode("<"))
    assert opening[1] in allowed(tag, [])
    guessed = prepared(manager, regex="<a>[0-9]")
    allowed(guessed, [])
    assert len(guessed.masks([opening[0]], encode("a>"))) == 3, "drafts of the grammar's text are taken back"
    for token in opening[1:]:
        free = allowed(guessed, [token])
    assert encode("x")[0] in free
    thought = prepared(manager, regex="<a>[0-9]")
    for token in [[], *([token] for token in opening)]:
        free = allowed(thought, token)
    assert encode("x")[0] in free
    assert encode("x")[0] not in allowed(thought, [END]), "the grammar begins behind the block"
    manager.close()


def test_some_models_always_begin_inside_a_block() -> None:
    markers = ThinkingMarkers((START,), (END,), always=True)
    manager = GrammarManager(vocabulary(), GrammarSettings(thinking=markers))
    made = prepared(manager, prompt=(1, 50, 51), regex="[0-9]+")
    assert encode("x")[0] in allowed(made, [])
    assert encode("x")[0] not in allowed(made, [END])
    over = prepared(manager, prompt=(1, START, END), regex="[0-9]+")
    assert encode("x")[0] not in allowed(over, [])
    manager.close()


def test_an_end_marker_of_several_tokens_is_found_in_the_text() -> None:
    end = "</think>"
    markers = ThinkingMarkers((), tuple(encode(end)), always=True, end_text=end)
    manager = GrammarManager(vocabulary(), GrammarSettings(thinking=markers))
    for tail in (end, "." + end, "x\n" + end):
        made = prepared(manager, regex="[0-9]+")
        allowed(made, [])
        for token in encode("Well" + tail):
            after = allowed(made, [token])
        assert encode("x")[0] not in after and encode("7")[0] in after, tail
    manager.close()


def test_thinking_survives_preemption() -> None:
    manager = thinking_manager()
    made = prepared(manager, prompt=(1, START), regex="[0-9]+")
    thought = [*encode("well"), END, *encode("1")]
    for token in [[], *([token] for token in thought)]:
        last = allowed(made, token)
    made.admit(thought[:1])
    assert encode("x")[0] in allowed(made, [])
    made.admit(thought)
    assert allowed(made, []) == last and 2 in last
    manager.close()


def test_a_request_may_ask_for_its_grammar_at_once() -> None:
    manager = thinking_manager()
    submit = Submit(id="r", input_ids=b"", sampling=SamplingParams(regex="[0-9]+"), grammar_at_once=True)
    made = Held(manager.prepare(submit, (1, START)))
    while not made.ready():
        time.sleep(0.01)
    assert {vocabulary().tokens[token][:1] for token in allowed(made, [])} <= {bytes([48 + n]) for n in range(10)}
    manager.close()


MESSAGE, OVER, BEGIN = 5, 6, 7
HARMONY = ThinkingMarkers((), (OVER,), channel=Channel(START, "final", MESSAGE, frozenset((OVER, BEGIN))))


def follow(made: Held, ids: list[int]) -> set[int]:
    found = allowed(made, [])
    for token in ids:
        assert token in found
        found = allowed(made, [token])
    return found


def test_the_grammar_begins_in_the_message_of_the_content() -> None:
    manager = GrammarManager(vocabulary(), GrammarSettings(thinking=HARMONY))
    analysis = [START, *encode("analysis"), MESSAGE, *encode("final it is 5"), OVER, BEGIN, *encode("assistant")]
    note = [START, *encode("commentary"), MESSAGE, *encode("I will. "), OVER, BEGIN, *encode("assistant")]
    digits = {vocabulary().encode(str(number))[0] for number in range(10)}
    for header in ("final", "final json"):
        made = prepared(manager, prompt=(1, BEGIN), regex="[0-9]+")
        free = follow(made, [*analysis, *note])
        assert len(free) == vocabulary().size - len(vocabulary().eos_ids), "no answer ends before its content"
        assert made.jump([*analysis, *note]) == []
        bound = follow(made, [START, *encode(header), MESSAGE])
        assert bound <= digits
        assert 2 in allowed(made, [min(digits)])
        made.admit(analysis)
        assert encode("x")[0] in allowed(made, []), "also after a preemption"
    manager.close()


def test_a_prompt_may_end_in_the_message_of_the_content() -> None:
    manager = GrammarManager(vocabulary(), GrammarSettings(thinking=HARMONY))
    content = (1, START, *encode("final"), MESSAGE, *encode("4"))
    for prompt, bound in (
        (content, True),
        ((*content, OVER, BEGIN), False),
        ((1, START, *encode("analysis"), MESSAGE, *encode("4")), False),
        ((*content, OVER, BEGIN, *encode("user"), MESSAGE, *encode("final")), False),
        ((1,), False),
    ):
        made = prepared(manager, prompt=prompt, regex="[0-9]+")
        assert (encode("x")[0] not in allowed(made, [])) is bound, prompt
    manager.close()


def test_a_block_may_end_with_the_marker_of_a_call() -> None:
    """Models jump out of their reasoning to a call; what the grammar does not take there is reasoning still."""
    jump = tuple(encode("<call>"))
    assert len(jump) > 1
    manager = GrammarManager(vocabulary(), GrammarSettings(thinking=ThinkingMarkers((START,), (END,), jumps=(jump,))))
    calls = prepared(manager, prompt=(1, START), regex="<call>[0-9]+")
    bound = follow(calls, [*encode("Hm."), *jump])
    assert encode("x")[0] not in bound and encode("7")[0] in bound
    for size in range(1, len(jump) + 1):
        calls.admit([*encode("Hm."), *jump[:size], *([] if size < len(jump) else encode("7"))])
        assert (encode("x")[0] in allowed(calls, [])) is (size < len(jump))
        calls.admit([*encode("Hm."), *jump])
        assert allowed(calls, []) == bound
    calls.admit(encode("Hm."))
    assert encode("x")[0] in allowed(calls, [])
    other = prepared(manager, prompt=(1, START), regex="[0-9]+")
    assert encode("x")[0] in follow(other, [*encode("Hm."), *jump])
    assert encode("x")[0] not in allowed(other, [END])
    manager.close()


def test_masks_behind_drafts_are_those_that_would_come_and_are_taken_back(manager: GrammarManager) -> None:
    ids = encode('{"the_first_long_property":12,"another_long_property":true}')
    made, alone = (prepared(manager, json_schema=json.dumps(LONG_KEYS)) for _ in range(2))
    want = [allowed(alone, [])] + [allowed(alone, [token]) for token in ids]
    at, sampled = 0, list[int]()
    for count in (3, 0, 5, 1, 40, 2, 40):
        drafts = ids[at : at + count]
        assert [bits(mask) for mask in made.masks(sampled, drafts)] == want[at : at + len(drafts) + 1]
        taken = len(drafts) // 2 + 1  # half of them are accepted, and a token of its own
        sampled, at = ids[at : at + taken], at + taken
    assert at >= len(ids) - 1


def test_masks_end_behind_a_draft_that_is_not_allowed(manager: GrammarManager) -> None:
    made = prepared(manager, regex="(abc|abd)+x?", min_new_tokens=4)
    a, b, c, x = (encode(letter)[0] for letter in "abcx")
    assert len(made.masks([], [a, b, x, a])) == 3
    assert len(made.masks([], [x])) == 1
    after = made.masks([a], [b, c, a])
    assert len(after) == 4 and 2 not in bits(after[2]), "three tokens: fewer than the least"
    ended = made.masks([b, c], [x, 2, 2, 2])
    assert [2 in bits(mask) for mask in ended] == [False, True, True, True, True]
    assert b in bits(made.mask([a]))


def test_a_draft_into_a_dead_end_fails_nobody(manager: GrammarManager) -> None:
    made = prepared(manager, ebnf="start: A X\nA: /[a-d]/\nX: /c+/ & /d+/\n")
    assert len(made.masks([], encode("a"))) == 1
    with pytest.raises(BadRequest, match="ebnf: the grammar admits no text"):
        made.masks(encode("a"), [])


def test_drafts_may_end_a_block_of_reasoning() -> None:
    manager = thinking_manager()
    made, alone = (prepared(manager, prompt=(1, START), regex="[0-9]+") for _ in range(2))
    ids = [*encode("hm"), END, *encode("1"), *encode("2"), 2]
    want = [allowed(alone, [])] + [allowed(alone, [token]) for token in ids]
    for place in range(len(ids) + 1):
        masks = made.masks(ids[place - 1 : place] if place else [], ids[place:])
        assert [bits(mask) for mask in masks] == want[place:]
    manager.close()
