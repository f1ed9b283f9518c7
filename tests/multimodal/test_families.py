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
    "two": ([5, "P", 200, 3, 7, "P", 99, 98, 97], [0, 1]),
    "three": ([5, "P", 3, "P", 200, 7, "P", 99], [2, 0, 2]),
}


@pytest.fixture(scope="module", params=seeing())
def pair(request: Any, tmp_path_factory: Any) -> Iterator[tuple[Theirs, Any, str]]:
    torch.set_num_threads(1)
    path = seeing_checkpoint(request.param, tmp_path_factory.mktemp("seeing"))
    yield Theirs(request.param, path), path, request.param


def engine_of(path: Any, **settings: Any) -> Engine:
    base = {"ops": "reference", "dtype": "float32", "max_total_tokens": 4096, "max_running_requests": 8, "threads": 1}
    return Engine(model_path=str(path), random_seed=1, debug_invariants=True, **(base | settings))


def ask(engine: Engine, name: str, **params: Any) -> dict[str, Any]:
    ids, which = TEXTS[name]
    mark = engine.tokenizer.encode(engine._client.pictures.processor.mark, add_special_tokens=False)[0]
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


@pytest.mark.parametrize("settings", [{}, {"chunked_prefill_size": 3, "max_running_requests": 2, "page_size": 4}])
def test_logits_and_greedy_text_are_those_of_transformers(pair: Any, settings: dict[str, Any]) -> None:
    theirs, path, _ = pair
    engine = engine_of(path, **settings)
    try:
        for name in TEXTS:
            check(theirs, ask(engine, name), name)
    finally:
        engine.shutdown()
