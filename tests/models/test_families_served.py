"""Families through the whole engine: greedy tokens are those of transformers, on a prefix hit and among others too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from model_support import PROMPT

from phloem import Engine
from phloem.testing.checkpoints import tiny_checkpoint

SERVED = ["deepseek_v3", "deepseek_v2-groups", "gpt2", "cohere2", "glm4_moe", "falcon-new", "ministral3", "gemma2"]
SERVED += ["llama4_text", "gemma4_text", "gemma3n_text", "deepseek_v32", "glm_moe_dsa"]
COUNT = 40


def greedy(path: Path, prompt: list[int]) -> list[int]:
    """With full passes alone: no cache that could be wrong the same way."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    tokens = list(prompt)
    with torch.inference_mode():
        for _ in range(COUNT):
            tokens.append(int(model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.slow
@pytest.mark.parametrize("name", SERVED)
def test_greedy_tokens_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    from phloem.checkpoint.families import family

    base, _, variant = name.partition("-")
    path = tiny_checkpoint(base, tmp_path, **(family(base).variants[variant] if variant else {}))
    wanted = greedy(path, PROMPT)
    sampling = {"max_new_tokens": COUNT, "temperature": 0, "ignore_eos": True}
    settings: dict[str, Any] = {"dtype": "float32", "max_total_tokens": 2048, "chunked_prefill_size": 16}
    with Engine(model_path=str(path), ops="reference", page_size=4, debug_invariants=True, **settings) as engine:
        first: Any = engine.generate(input_ids=PROMPT, sampling_params=sampling)
        again: Any = engine.generate(input_ids=[PROMPT, PROMPT[:9], PROMPT], sampling_params=sampling)
    assert first["output_ids"] == wanted
    assert again[0]["output_ids"] == again[2]["output_ids"] == wanted
    assert again[0]["meta_info"]["cached_tokens"] >= len(PROMPT) // 4 * 4 - 4
