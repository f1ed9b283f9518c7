"""Families that see, against transformers: pictures anywhere, in chunks, from the prefix tree, beside text rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from vision_support import Theirs, picture, png, seeing, seeing_checkpoint

from phloem.llm import Engine

PICTURES = [picture(1, 24, 16), picture(2, 17, 40), picture(3, 32, 32)]
TEXTS = {
    "none": ([5, 17, 200, 301, 44, 9], []),
    "one": ([5, 17, 200, "P", 301, 44, 9, 12], [0]),
    "first": (["P", 301, 44, 9, 12], [1]),
    "two": ([5, "P", 200, 3, 70, "P", 99, 98, 97], [0, 1]),
    "three": ([5, "P", 3, "P", 200, 70, "P", 99], [2, 0, 2]),
}


FAST = ("qwen2_5_vl", "llava")
FAMILIES = [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in seeing()]


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: Any, tmp_path_factory: Any) -> Iterator[tuple[Theirs, Any, str]]:
    torch.set_num_threads(1)
    path = seeing_checkpoint(request.param, tmp_path_factory.mktemp("seeing"))
    yield Theirs(request.param, path), path, request.param


def engine_of(path: Any, **settings: Any) -> Engine:
    base = {"ops": "reference", "dtype": "float32", "max_total_tokens": 4096, "max_running_requests": 8, "threads": 1}
    return Engine(model_path=str(path), random_seed=1, debug_invariants=True, **(base | settings))


def ask(engine: Engine, name: str, **params: Any) -> dict[str, Any]:
    ids, which = TEXTS[name]
    mark = engine.tokenizer.encode(engine._client.pictures.processors["image"].mark, add_special_tokens=False)[0]
    found: Any = engine.generate(
        input_ids=[mark if token == "P" else token for token in ids],
        image_data=[png(PICTURES[number]) for number in which],
        sampling_params={"temperature": 0, "max_new_tokens": 8, "ignore_eos": True, **params},
        return_logprob=True,
        logprob_start_len=0,
        return_prompt_token_ids=True,
    )
    return found


def check(theirs: Theirs, found: dict[str, Any], name: str) -> None:
    ids, meta = found["meta_info"]["prompt_token_ids"], found["meta_info"]
    images = [PICTURES[number] for number in TEXTS[name][1]]
    logits = theirs.logits(ids, images).log_softmax(-1)
    ours = [entry[0] for entry in meta["input_token_logprobs"]][1:]
    wanted = [float(logits[at, token]) for at, token in enumerate(ids[1:])]
    worst = max(abs(a - b) for a, b in zip(ours, wanted, strict=True))
    assert worst < 1e-4, f"{name}: {worst}"
    assert found["output_ids"] == theirs.greedy(ids, images, 8)


@pytest.mark.some(11)
@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"chunked_prefill_size": 3, "max_running_requests": 2, "page_size": 4}])
def test_logits_and_greedy_text_are_those_of_transformers(pair: Any, settings: dict[str, Any]) -> None:
    theirs, path, _ = pair
    engine = engine_of(path, **settings)
    try:
        for name in TEXTS:
            check(theirs, ask(engine, name), name)
    finally:
        engine.shutdown()


@pytest.mark.some(6)
@pytest.mark.slow
def test_pictures_are_found_by_content(pair: Any) -> None:
    """The same prompt again is neither encoded nor computed; the same text about another picture shares no more than
    what stands before it; a picture in another place is computed again, and not encoded."""
    theirs, path, _ = pair
    engine = engine_of(path, page_size=1)
    try:
        first = ask(engine, "one", max_new_tokens=8)
        again = plain(engine, "one")
        other = plain(engine, "one", [1])
        length = len(first["meta_info"]["prompt_token_ids"])
        assert again["meta_info"]["cached_tokens"] == length - 1
        token = engine._client.pictures.tokens["image"]
        assert other["meta_info"]["cached_tokens"] == other["meta_info"]["prompt_token_ids"].index(token)
        assert again["output_ids"] == first["output_ids"]
        assert other["output_ids"] == theirs.greedy(other["meta_info"]["prompt_token_ids"], [PICTURES[1]], 8)
        assert encoded(engine) == (2, 0)
        plain(engine, "first", [0])
        assert encoded(engine) == (2, 1)
        cut = plain(engine, "one", [0], tail=[77])  # from the tree up to the middle of the text behind the picture
        assert cut["output_ids"] == theirs.greedy(cut["meta_info"]["prompt_token_ids"], [PICTURES[0]], 8)
    finally:
        engine.shutdown()


@pytest.mark.some(6)
@pytest.mark.slow
def test_many_at_once_are_as_alone(pair: Any) -> None:
    """Pictures and texts in the same steps, several continuations, preemptions: each answer is the one it has alone."""
    _, path, name = pair
    # Long answers do not fit beside one another: some are preempted.
    long = 40 if name == "qwen2_5_vl" else 8
    room = {"smolvlm": 900, "idefics3": 900, "llava-pixtral": 480, "llava_onevision": 480}.get(name, 160)
    engine = engine_of(path, chunked_prefill_size=16, page_size=4, max_total_tokens=room)
    try:
        alone = {text: plain(engine, text, length=long)["output_ids"] for text in TEXTS}
        engine.flush_cache()
        mark = mark_of(engine)
        names = [*TEXTS] * 3
        found: Any = engine.generate(
            input_ids=[[mark if token == "P" else token for token in TEXTS[text][0]] for text in names],
            image_data=[[png(PICTURES[number]) for number in TEXTS[text][1]] for text in names],
            sampling_params={"temperature": 0, "max_new_tokens": long, "ignore_eos": True, "n": 2},
        )
        each = [answer["output_ids"] for answer in found]
        assert each == [alone[text] for text in names for _ in range(2)]
        assert name != "qwen2_5_vl" or engine.get_server_info()["internal_states"][0]["preemptions"] > 0
    finally:
        engine.shutdown()


def mark_of(engine: Engine) -> int:
    return engine.tokenizer.encode(engine._client.pictures.processors["image"].mark, add_special_tokens=False)[0]


def plain(
    engine: Engine, name: str, which: list[int] | None = None, tail: list[int] | None = None, length: int = 8
) -> dict[str, Any]:
    ids, own = TEXTS[name]
    mark = mark_of(engine)
    found: Any = engine.generate(
        input_ids=[mark if token == "P" else token for token in [*ids[: len(ids) - bool(tail)], *(tail or [])]],
        image_data=[png(PICTURES[number]) for number in (own if which is None else which)],
        sampling_params={"temperature": 0, "max_new_tokens": length, "ignore_eos": True},
        return_prompt_token_ids=True,
    )
    return found


def encoded(engine: Engine) -> tuple[int, int]:
    """Pictures of the tower and of the encoder cache, since the start."""
    state = engine.get_server_info()["internal_states"][0]
    return state["pictures_encoded"], state["pictures_found"]


def test_the_machines_own_kernels_are_near(pair: Any) -> None:
    """The table and the types that this machine takes by itself: packed weights, 16-bit keys and values."""
    theirs, path, name = pair
    engine = engine_of(path, ops=None, dtype="auto", kv_cache_dtype="bfloat16")
    try:
        found = ask(engine, "two")
        ids = found["meta_info"]["prompt_token_ids"]
        logits = theirs.logits(ids, [PICTURES[number] for number in TEXTS["two"][1]]).log_softmax(-1)
        ours = torch.tensor([entry[0] for entry in found["meta_info"]["input_token_logprobs"]][1:])
        wanted = torch.stack([logits[at, token] for at, token in enumerate(ids[1:])])
        apart = (ours - wanted).abs()
        # Of two experts that score alike rounding may choose the other: a jump at one token, which is no error.
        assert (apart if name != "glm4v_moe" else apart.sort().values[:-1]).max() < 0.1
        assert engine.get_server_info()["ops"] is None
    finally:
        engine.shutdown()


def test_a_grammar_holds_behind_a_picture(pair: Any) -> None:
    _, path, _ = pair
    engine = engine_of(path)
    try:
        found: Any = engine.generate(
            "<|im_start|>user\n<image> What is it?<|im_end|>\n",
            {"temperature": 0, "max_new_tokens": 16, "regex": "(cat|dog) [0-9]"},
            image_data=PICTURES[0],
        )
        assert found["text"] in {f"{what} {number}" for what in ("cat", "dog") for number in range(10)}
    finally:
        engine.shutdown()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2_5_vl", "gemma3"])
def test_drafts_change_nothing_behind_pictures(name: str, tmp_path_factory: Any) -> None:
    """Also while other prompts with pictures are computed in the steps that verify."""
    path = seeing_checkpoint(name, tmp_path_factory.mktemp("drafts"))
    answers: list[list[list[int]]] = []
    for drafter in ("none", "ngram"):
        engine = engine_of(path, speculative_algorithm=drafter, disable_speculative_adaptive=True)
        try:
            mark = mark_of(engine)
            names = [*TEXTS] * 2
            found: Any = engine.generate(
                input_ids=[[mark if token == "P" else token for token in TEXTS[text][0]] for text in names],
                image_data=[[png(PICTURES[number]) for number in TEXTS[text][1]] for text in names],
                sampling_params={"temperature": 0, "max_new_tokens": 24, "ignore_eos": True},
            )
            answers.append([answer["output_ids"] for answer in found])
        finally:
            engine.shutdown()
    assert answers[0] == answers[1]
