"""DiffusionGemma against transformers' own class: logits of canvases, and the answers of its `generate`.

Its generation draws by torch's generators; in its place stand the product's draws, of seed, place and pass, so that
answers are compared token by token.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from engine_door import http_door
from model_support import PAGE, PROMPT, close
from model_support import Engine as Steps
from safetensors.torch import load_file, save_file

import phloem
from phloem.attention import begin
from phloem.attention._both_ways import Spans, both_ways
from phloem.checkpoint.describe import described
from phloem.core.config import Config
from phloem.core.errors import BadRequest, ConfigError, OutOfMemory
from phloem.engine import worker
from phloem.engine.canvases.renoise import RenoisingRunner
from phloem.engine.sampling.sampler import uniforms
from phloem.kernels.ops import PagedBatch
from phloem.launch import core
from phloem.layers.context import ForwardBatch
from phloem.testing.checkpoints import tiny_checkpoint

CANVAS, VOCAB = 16, 384
# Random weights are sure of nothing: with these a canvas takes a few passes.
HOW: dict[str, Any] = {
    "max_denoising_steps": 7, "entropy_bound": 40.0, "t_min": 0.4, "t_max": 0.8, "confidence_threshold": 5.0,
}  # fmt: skip
SETTINGS: dict[str, Any] = {
    "dtype": "float32", "max_total_tokens": 4096, "debug_invariants": True, "threads": 1, "random_seed": 5,
    "served_model_name": "tiny",
}  # fmt: skip


class Draws:
    """`torch.randint` and `torch.multinomial` of one generation: each canvas begins with noise, and in each pass tokens
    are drawn, then noise."""

    def __init__(self, prompt: int, seed: int, temperature: float) -> None:
        self.start, self.seed, self.temperature = prompt - CANVAS, seed, temperature
        self.number, self.drawn = 0, False

    def uniforms(self, mark: int) -> Any:
        at = (self.start + np.arange(CANVAS)) | (self.number << 32) | mark
        return uniforms(np.full(CANVAS, self.seed, np.uint64), at.astype(np.uint64)).astype(np.float64)

    def randint(self, **_: Any) -> torch.Tensor:
        if self.drawn:
            self.number, self.drawn = self.number + 1, False
        else:
            self.start, self.number = self.start + CANVAS, 0
        return torch.from_numpy((self.uniforms(1 << 62) * VOCAB).astype(np.int64))[None]

    def multinomial(self, weights_nV: torch.Tensor, **_: Any) -> torch.Tensor:
        self.drawn = True
        if not self.temperature:
            return weights_nV.argmax(-1, keepdim=True)
        sums = weights_nV.double().cumsum(-1)
        wanted = torch.from_numpy(self.uniforms(0))[:, None] * sums[:, -1:]
        return torch.searchsorted(sums, wanted, right=True)


class Reference:
    """transformers' model."""

    def __init__(self, path: Path) -> None:
        import transformers

        self.model: Any = transformers.DiffusionGemmaForBlockDiffusion.from_pretrained(path, dtype=torch.float32).eval()

    def generate(
        self, prompt: list[int], count: int, seed: int = 3, temperature: float = 1.0, end: int = -1, **how: Any
    ) -> tuple[list[int], int]:
        """(The answer, cut behind its first end, the passes that it took)."""
        draws = Draws(len(prompt), seed, temperature)
        asked = {**HOW, **how}
        from transformers.models.diffusion_gemma.generation_diffusion_gemma import EntropyBoundSamplerConfig

        asked["sampler_config"] = EntropyBoundSamplerConfig(entropy_bound=asked.pop("entropy_bound"))
        passes, forward = 0, self.model.forward

        def counted(*args: Any, **kwargs: Any) -> Any:
            nonlocal passes
            passes += 1
            return forward(*args, **kwargs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "randint", draws.randint)
            patch.setattr(torch, "multinomial", draws.multinomial)
            patch.setattr(self.model, "forward", counted)
            ids = torch.tensor([prompt])
            found = self.model.generate(ids, max_new_tokens=count, eos_token_id=[end], pad_token_id=None, **asked)
        answer = found.sequences[0, len(prompt) :].tolist()[:count]
        return answer[: answer.index(end) + 1] if end in answer else answer, passes


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint whose passes do not magnify the last digits of the pass before, as random weights do."""
    folder = tiny_checkpoint("diffusion_gemma", tmp_path_factory.mktemp("tiny"))
    tensors, smaller = load_file(folder / "model.safetensors"), {"self_conditioning.down_proj": 0.2, "q_norm": 0.3}
    for name, part in itertools.product(tensors, smaller):
        if part in name:
            tensors[name] *= smaller[part]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def reference(path: Path) -> Reference:
    return Reference(path)


@pytest.fixture(scope="module")
def served(path: Path) -> Iterator[Any]:
    with phloem.Engine(
        model_path=str(path), dllm_algorithm_config=HOW, chunked_prefill_size=48, max_running_requests=8, **SETTINGS
    ) as engine:
        yield engine


@pytest.fixture(scope="module")
def client(served: Any) -> Iterator[httpx.Client]:
    with http_door(served) as url, httpx.Client(base_url=url, timeout=60) as found:
        yield found


def prompts(lengths: list[int]) -> list[list[int]]:
    made = random.Random(7)
    return [[made.randrange(3, VOCAB) for _ in range(length)] for length in lengths]


def ask(engine: Any, some: Any, count: int = 20, **values: Any) -> Any:
    """Answers of one prompt, or of several together."""
    sampling: dict[str, Any] = {
        "max_new_tokens": count, "temperature": 1, "sampling_seed": 3, "ignore_eos": True, **values
    }  # fmt: skip
    return engine.generate(input_ids=some, sampling_params=sampling)


def of(found: Any) -> tuple[list[int], int]:
    return found["output_ids"], found["meta_info"]["dllm_passes"]


@torch.inference_mode()
def test_logits_of_a_canvas_are_those_of_transformers_with_and_without_what_the_pass_before_made_likely(
    path: Path, reference: Reference
) -> None:
    steps, (canvas,) = Steps(path), prompts([CANVAS])
    model: Any = steps.model
    hot = torch.randn(CANVAS, VOCAB, generator=torch.Generator().manual_seed(1)) * 3
    for known in (PROMPT, PROMPT[:3]):
        for before in (None, hot):
            wanted = reference.model(
                input_ids=torch.tensor([known]),
                decoder_input_ids=torch.tensor([canvas]),
                self_conditioning_logits=None if before is None else before[None],
            ).logits[0]
            soft = torch.zeros(CANVAS, 32) if before is None else model.soften(before.softmax(-1))
            close(canvas_logits(steps, known, canvas, soft), wanted)


def canvas_logits(steps: Steps, known: list[int], canvas: list[int], soft: torch.Tensor) -> torch.Tensor:
    """Text and canvas in one step."""
    ids, pages = [*known, *canvas], steps.pages(len(known) + CANVAS)
    length = len(ids)
    slots = torch.tensor([pages[at // PAGE] * PAGE + at % PAGE for at in range(length)], dtype=torch.int32)
    starts, ends = torch.tensor([0, length], dtype=torch.int32), torch.tensor([length], dtype=torch.int32)
    table = torch.tensor([pages], dtype=torch.int32)
    batches = [PagedBatch(starts, ends, table, slots, length, length) for _ in steps.pool.groups]
    index, model = torch.arange(len(known), length), steps.model
    spans = Spans(
        index, torch.tensor([0]), torch.tensor([0, CANVAS], dtype=torch.int32), ends, CANVAS, length, canvases=True
    )
    memory = both_ways(begin(steps.attention, batches, steps.pool), steps.ops, spans)
    embeds = index, model.condition(torch.tensor(canvas), soft)  # pyright: ignore[reportAttributeAccessIssue]
    step = ForwardBatch(torch.tensor(ids), torch.arange(length), memory, index, None, embeds)
    return model.head(model.forward(step))


@pytest.mark.slow
def test_answers_are_those_of_transformers_generate_alone_and_together(served: Any, reference: Reference) -> None:
    some = prompts([1, 3, 8, 16, 23, 61])
    wanted = [reference.generate(prompt, 40) for prompt in some]
    assert [of(one) for one in ask(served, some, 40)] == wanted
    assert of(ask(served, some[4], 40)) == wanted[4]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("values", "how"),
    [
        ({"temperature": 0}, {"temperature": 0.0}),
        ({"sampling_seed": 11}, {"seed": 11}),
    ],
    ids=["the-likeliest", "another-seed"],
)
def test_temperature_and_seed_decide_the_draws(served: Any, reference: Reference, values: Any, how: Any) -> None:
    (prompt,) = prompts([9])
    assert of(ask(served, prompt, 20, **values)) == reference.generate(prompt, 20, **how)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "temperature"),
    [
        ({"max_denoising_steps": 4, "entropy_bound": 60.0, "stability_threshold": 0, "t_max": 0.5}, 1.0),
        ({"max_denoising_steps": 9, "entropy_bound": 900.0, "confidence_threshold": 6.0}, 0.0),
    ],
    ids=["sure", "unchanged"],
)
def test_settings_decide_how_many_passes_a_canvas_takes(
    path: Path, reference: Reference, how: dict[str, Any], temperature: float
) -> None:
    (prompt,) = prompts([5])
    wanted = reference.generate(prompt, 20, temperature=temperature, **how)
    with phloem.Engine(model_path=str(path), dllm_algorithm_config={**HOW, **how}, **SETTINGS) as engine:
        assert of(ask(engine, prompt, temperature=temperature)) == wanted
    assert wanted[1] < 2 * how["max_denoising_steps"]  # of two canvases


def test_a_repeat_finds_its_text_in_the_cache(served: Any, reference: Reference) -> None:
    (prompt,) = prompts([77])
    first, again = ask(served, prompt), ask(served, prompt)
    assert of(first) == of(again) == reference.generate(prompt, 20)
    assert again["meta_info"]["cached_tokens"] == 64
    longer = [*prompt, *first["output_ids"], 9, 8]
    assert of(ask(served, longer)) == reference.generate(longer, 20)


def test_an_answer_ends_at_its_first_end(served: Any, reference: Reference) -> None:
    (prompt,) = prompts([12])
    plain, _ = reference.generate(prompt, 30)
    end = next(token for at, token in enumerate(plain) if at > 2 and token not in plain[:at])
    found = ask(served, prompt, 30, stop_token_ids=[end])
    assert of(found) == reference.generate(prompt, 30, end=end)
    assert found["meta_info"]["finish_reason"] == {"type": "stop", "matched": end}


def test_log_probabilities_are_of_the_last_pass(served: Any) -> None:
    (prompt,) = prompts([11])
    sampling = {"max_new_tokens": 19, "temperature": 1, "ignore_eos": True}
    found: Any = served.generate(
        input_ids=prompt, sampling_params=sampling, return_logprob=True, top_logprobs_num=2, token_ids_logprob=[5]
    )
    meta = found["meta_info"]
    assert [token for _, token, _ in meta["output_token_logprobs"]] == found["output_ids"]
    assert all(
        top[0][:2] == own[:2]
        for top, own in zip(meta["output_top_logprobs"], meta["output_token_logprobs"], strict=True)
    )


class Starved(RenoisingRunner):
    """One for two of whose steps there is no memory."""

    count = 0

    def launch(self, batch: Any) -> Any:
        Starved.count += 1
        return self if Starved.count in (2, 4) else super().launch(batch)

    def result(self) -> Any:
        raise OutOfMemory("made up")


@pytest.mark.slow
def test_requests_that_lose_their_pages_or_steps_give_the_same_answers(
    path: Path, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    some = prompts([18, 25, 33, 40, 9, 50])
    wanted = [reference.generate(prompt, 48)[0] for prompt in some]
    tight = {**SETTINGS, "max_total_tokens": 192, "chunked_prefill_size": 32, "dllm_algorithm_config": HOW}
    with phloem.Engine(model_path=str(path), **tight) as engine:
        assert [one["output_ids"] for one in ask(engine, some, 48)] == wanted
        assert engine.get_server_info()["internal_states"][0]["preemptions"] > 0
    monkeypatch.setattr(core, "RenoisingRunner", Starved)
    few = {**HOW, "max_denoising_steps": 3}
    wanted = [reference.generate(prompt, 12, max_denoising_steps=3)[0] for prompt in some[:2]]
    starved = {**SETTINGS, "disable_overlap_schedule": True, "dllm_algorithm_config": few}
    with phloem.Engine(model_path=str(path), **starved) as engine:
        assert [one["output_ids"] for one in ask(engine, some[:2], 12)] == wanted
        assert engine.get_server_info()["internal_states"][0]["out_of_memory"] > 0


def test_a_canvas_that_does_not_fit_the_context_is_not_begun(served: Any) -> None:
    (prompt,) = prompts([470])
    assert len(ask(served, prompt, 400)["output_ids"]) == 2 * CANVAS  # 512 positions: two canvases
    with pytest.raises(BadRequest, match="leaves no room in the context of 512"):
        ask(served, prompts([500])[0])


def test_chat_streams_canvas_by_canvas_and_says_the_same_whole(client: httpx.Client) -> None:
    body = {"model": "tiny", "max_tokens": 40, "seed": 4, "messages": [{"role": "user", "content": "Hi"}]}
    whole = client.post("/v1/chat/completions", json=body).json()
    lines = client.post("/v1/chat/completions", json={**body, "stream": True}).text.splitlines()
    events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    pieces = [event["choices"][0]["delta"].get("content") or "" for event in events if event["choices"]]
    assert "".join(pieces) == whole["choices"][0]["message"]["content"]
    assert whole["usage"]["completion_tokens"] <= 40 and len([one for one in pieces if one]) <= 3
    refused = client.post("/v1/chat/completions", json={**body, "response_format": {"type": "json_object"}})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "response_format"


@pytest.mark.parametrize(
    ("file", "key", "value", "words"),
    [
        ("generation_config.json", "sampler_config", {"entropy_bound": "x"}, "entropy_bound is 'x', expected a number"),
        ("generation_config.json", "t_max", -1, "t_max is -1, expected 0.001 to 100"),
        ("config.json", "canvas_length", 0, "canvas_length is 0, expected 1 to 4096"),
    ],
)
def test_a_checkpoint_with_odd_settings_is_named(
    path: Path, file: str, key: str, value: Any, words: str, tmp_path: Path
) -> None:
    for one in path.iterdir():
        (tmp_path / one.name).write_bytes(one.read_bytes())
    stored = json.loads((tmp_path / file).read_text())
    (tmp_path / file).write_text(json.dumps({**stored, key: value}))
    found = Config.from_flat({"model_path": str(tmp_path), **SETTINGS})
    with pytest.raises(ConfigError, match=f"{file}: {words}"):
        worker.build(found, described(found.model), lambda phase, seconds: None)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"dllm_algorithm": "LowConfidence"}, "known for this model: Gemma4Renoise"),
        ({"dllm_algorithm_config": {"threshold": 0.5}}, "threshold not known here; known: canvas_length"),
        ({"dllm_algorithm_config": {"t_max": 0.2}}, "t_max is 0.2, expected more than t_min 0.4"),
        ({"dllm_algorithm_config": {"max_denoising_steps": 0}}, "max_denoising_steps is 0, expected 1 to 4096"),
        ({"dllm_algorithm_config": {"entropy_bound": True}}, "entropy_bound is True, expected a number"),
        ({"dllm_algorithm_config": '{"confidence_threshold": NaN}'}, "confidence_threshold is nan, expected"),
        ({"dllm_algorithm_config": {"canvas_length": 512}}, "leave no room for a prompt in a context of 512"),
        ({"kv_cache_dtype": "int8"}, "kv_cache_dtype: the tokens of this model's canvases"),
        ({"speculative_algorithm": "ngram"}, "a model of diffusion"),
    ],
)
def test_what_it_is_not_served_with_is_refused_before_it_is_ready(path: Path, settings: Any, words: str) -> None:
    found = Config.from_flat({"model_path": str(path), **SETTINGS, **settings})
    with pytest.raises(ConfigError, match=words):
        worker.build(found, described(found.model), lambda phase, seconds: None)
