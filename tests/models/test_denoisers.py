"""Language models of diffusion against dense references written from their papers and files: logits, then answers."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_denoisers import DENSE, How, decode
from model_support import PROMPT, Engine, close

import phloem
from phloem.checkpoint.families import family
from phloem.testing.checkpoints import denoisers, tiny_checkpoint

NAMES = [*denoisers(), *(f"{name}-{variant}" for name in denoisers() for variant in family(name).variants)]
SETTINGS: dict[str, Any] = {
    "dtype": "float32", "max_total_tokens": 4096, "debug_invariants": True, "threads": 1, "random_seed": 5,
}  # fmt: skip
LENGTHS = [1, 3, 4, 7, 8, 9, 16, 23, 33]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A tiny checkpoint of a family or variant, written once."""
    kept: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in kept:
            base, _, variant = name.partition("-")
            different = family(base).variants[variant] if variant else {}
            kept[name] = tiny_checkpoint(base, tmp_path_factory.mktemp("tiny"), **different)
        return kept[name]

    return get


def prompts(lengths: list[int]) -> list[list[int]]:
    made = random.Random(7)
    return [[made.randrange(3, 384) for _ in range(length)] for length in lengths]


def test_every_family_of_diffusion_has_a_dense_reference() -> None:
    assert set(DENSE) == set(denoisers())


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_the_dense_reference_in_any_chunks_of_whole_blocks(name: str, path: Any) -> None:
    engine, dense = Engine(path(name)), DENSE[name.partition("-")[0]](path(name))
    with torch.inference_mode():
        close(engine.whole(PROMPT), dense.logits(PROMPT))
        block, pages = dense.block, engine.pages(len(PROMPT))
        for start in range(0, len(PROMPT), block):
            # A canvas is written where its final tokens will be: first with something else in its places.
            engine.step([([2] * len(PROMPT[start : start + block]), pages, start)])
            again = engine.step([(PROMPT[start : start + block], pages, start)], every=True)
            close(again, dense.logits(PROMPT)[start : start + block])


@pytest.fixture(scope="module", params=[("sdar", {}), ("llada2_moe", {"chunked_prefill_size": 16})], ids=["sdar", "llada2"])
def served(request: Any, path: Any) -> Iterator[Any]:
    """An engine, and the dense reference of what it serves."""
    name, more = request.param
    with phloem.Engine(model_path=str(path(name)), **{**SETTINGS, **more}) as engine:
        yield engine, DENSE[name](path(name))


def ask(engine: Any, some: Any, count: int = 14, **values: Any) -> Any:
    """Answers of one prompt, or of several together."""
    sampling = {"max_new_tokens": count, "temperature": 0, "ignore_eos": True, **values}
    return engine.generate(input_ids=some, sampling_params=sampling)


def test_answers_are_those_of_the_dense_reference_alone_and_together(served: Any) -> None:
    engine, dense = served
    some = prompts(LENGTHS)
    wanted = [decode(dense, prompt, 14, How()) for prompt in some]
    together = ask(engine, some)
    assert [one["output_ids"] for one in together] == [tokens for tokens, _ in wanted]
    assert [one["meta_info"]["dllm_passes"] for one in together] == [passes for _, passes in wanted]
    for prompt, (tokens, _) in list(zip(some, wanted, strict=True))[::3]:
        assert ask(engine, prompt)["output_ids"] == tokens
