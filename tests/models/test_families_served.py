"""Families through the whole engine: greedy tokens are those of transformers, behind chunks and on a prefix hit,
among others in a batch, and after a row lost its pages.

A few families stand for all; `pytest --every tests/models/test_families_served.py` takes each, and their variants.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from model_support import PROMPT, their_greedy

from phloem import Engine
from phloem.checkpoint.families import family
from phloem.testing.checkpoints import families, tiny_checkpoint

SERVED = ["deepseek_v3", "deepseek_v2-groups", "gpt2", "cohere2", "glm4_moe", "falcon-new", "ministral3", "gemma2"]
SERVED += ["llama4_text", "gemma4_text", "gemma3n_text", "deepseek_v32", "glm_moe_dsa"]
SERVED += ["gpt_oss", "apertus", "arcee", "bamba", "cohere"]
PREEMPTED = ["gpt_oss", "lfm2", "mamba2", "qwen3_next", "kimi_linear"]
COUNT = 64
TEXT = [20 + token % 360 for token in PROMPT]  # without the tokens that stand for pictures
LONG = TEXT * 2  # longer than any window and than a chunk
SAMPLING = {"max_new_tokens": COUNT, "temperature": 0, "ignore_eos": True}
# Tiny tensors: a second thread only spins.
SETTINGS: dict[str, Any] = {"dtype": "float32", "ops": "reference", "threads": 1, "page_size": 4}
SETTINGS |= {"chunked_prefill_size": 16}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    every = families() if metafunc.config.getoption("--every") else None
    if metafunc.definition.originalname == "test_greedy_tokens_are_those_of_transformers":
        variants = [f"{name}-{variant}" for name in every or () for variant in family(name).variants]
        metafunc.parametrize("name", [*every, *variants] if every is not None else SERVED)
    else:
        metafunc.parametrize("name", every if every is not None else PREEMPTED)


@pytest.mark.some(6)
@pytest.mark.slow
def test_greedy_tokens_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    base, _, variant = name.partition("-")
    path = tiny_checkpoint(base, tmp_path, **(family(base).variants[variant] if variant else {}))
    wanted = [their_greedy(path, prompt, COUNT) for prompt in (LONG, TEXT[:9])]
    with Engine(model_path=str(path), max_total_tokens=2048, debug_invariants=True, **SETTINGS) as engine:
        first: Any = engine.generate(input_ids=LONG, sampling_params=SAMPLING)
        again: Any = engine.generate(input_ids=[LONG, TEXT[:9], LONG], sampling_params=SAMPLING)
    assert first["output_ids"] == wanted[0]
    assert [one["output_ids"] for one in again] == [wanted[0], wanted[1], wanted[0]]
    assert again[0]["meta_info"]["cached_tokens"] >= (len(LONG) - 1) // 4 * 4 - 4


@pytest.mark.some(3)
@pytest.mark.slow
def test_rows_that_lose_their_pages_go_on_with_the_same_tokens(name: str, tmp_path: Path) -> None:
    """A pool too small for all: some are preempted, and begin again from what the tree has kept."""
    path = tiny_checkpoint(name, tmp_path)
    prompts = [[20 + (11 * place + number) % 90 for place in range(20)] for number in range(4)]
    settings = {**SETTINGS, "max_total_tokens": 184, "max_running_requests": 4, "debug_invariants": True}
    with Engine(model_path=str(path), **settings) as engine:
        alone: Any = [engine.generate(input_ids=prompt, sampling_params=SAMPLING) for prompt in prompts]
        assert engine.get_server_info()["internal_states"][0]["preemptions"] == 0
        engine.flush_cache()
        many: Any = engine.generate(input_ids=prompts, sampling_params=SAMPLING)
        preempted = engine.get_server_info()["internal_states"][0]["preemptions"]
    assert [one["output_ids"] for one in many] == [one["output_ids"] for one in alone]
    assert preempted > 0 or name != "gpt_oss"
