"""Language models of diffusion against dense references written from their papers and files: logits, then answers."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_denoisers import DENSE, How, decode
from linear_cases import needs_native
from model_support import PROMPT, Engine, close

import phloem
from phloem.checkpoint.describe import describe, described
from phloem.checkpoint.families import family
from phloem.core.config import Config
from phloem.core.errors import BadRequest, ConfigError, ModelLoadError, OutOfMemory
from phloem.engine import worker
from phloem.engine.canvases.canvas import CanvasRunner
from phloem.launch import core
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
def test_logits_are_those_of_the_dense_reference_whole_and_block_by_block(name: str, path: Any) -> None:
    engine, dense = Engine(path(name)), DENSE[name.partition("-")[0]](path(name))
    with torch.inference_mode():
        close(engine.whole(PROMPT), dense.logits(PROMPT))
        if dense.whole:
            return
        block, pages = dense.block, engine.pages(len(PROMPT))
        for start in range(0, len(PROMPT), block):
            # A canvas is written where its final tokens will be: first with something else in its places.
            engine.step([([2] * len(PROMPT[start : start + block]), pages, start)])
            again = engine.step([(PROMPT[start : start + block], pages, start)], every=True)
            close(again, dense.logits(PROMPT)[start : start + block])


SERVED = [
    ("sdar", {}),
    ("llada2_moe", {"chunked_prefill_size": 16}),
    ("llada", {"chunked_prefill_size": 64}),
    ("dream", {}),
]


@pytest.fixture(
    scope="module",
    params=[pytest.param(one, marks=pytest.mark.slow if one[0] in ("llada2_moe", "dream") else ()) for one in SERVED],
    ids=[name for name, _ in SERVED],
)
def served(request: Any, path: Any) -> Iterator[Any]:
    """An engine, and the dense reference of what it serves."""
    name, more = request.param
    with phloem.Engine(model_path=str(path(name)), **{**SETTINGS, **more}) as engine:
        yield engine, DENSE[name](path(name))


def ask(engine: Any, some: Any, count: int = 14, **values: Any) -> Any:
    """Answers of one prompt, or of several together."""
    sampling: dict[str, Any] = {"max_new_tokens": count, "temperature": 0, "ignore_eos": True, **values}
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


@pytest.mark.parametrize(
    ("settings", "how"),
    [
        ({"threshold": 0.0}, How(threshold=0.0)),
        ({"threshold": 0.12}, How(threshold=0.12)),
        ({"threshold": 0.12, "steps": 3}, How(threshold=0.12, steps=3)),
        ({"threshold": 1.0, "block_size": 8}, How(threshold=1.0)),
    ],
    ids=["all-at-once", "threshold", "steps", "other-blocks"],
)
def test_thresholds_and_steps_decide_how_many_passes_a_block_takes(settings: Any, how: How, path: Any) -> None:
    dense, some = DENSE["sdar"](path("sdar")), prompts([2, 9, 14])
    dense.block = settings.get("block_size", dense.block)
    wanted = [decode(dense, prompt, 13, how) for prompt in some]
    with phloem.Engine(model_path=str(path("sdar")), dllm_algorithm_config=settings, **SETTINGS) as engine:
        found = ask(engine, some, 13)
    assert [(one["output_ids"], one["meta_info"]["dllm_passes"]) for one in found] == wanted
    per_pass = [one["meta_info"]["tokens_per_forward"] for one in found]
    assert per_pass == [len(tokens) / passes for tokens, passes in wanted]
    assert how.threshold or min(per_pass) > 2


def test_draws_are_of_seed_place_and_pass_alone(served: Any) -> None:
    engine, dense = served
    some = prompts([1, 6, 21])
    wanted = [decode(dense, prompt, 14, How(temperature=0.7, top_k=9, seed=3))[0] for prompt in some]
    values: dict[str, Any] = {"temperature": 0.7, "top_k": 9, "sampling_seed": 3}
    assert [one["output_ids"] for one in ask(engine, some, **values)] == wanted
    assert ask(engine, some[2], **values)["output_ids"] == wanted[2]
    values |= {"sampling_seed": None, "n": 3}
    several = ask(engine, some[1], **values)
    assert len({tuple(one["output_ids"]) for one in several}) == 3


@pytest.mark.slow
def test_a_repeat_finds_its_finished_blocks_in_the_cache(served: Any) -> None:
    engine, dense = served
    (prompt,) = prompts([77])
    wanted, _ = decode(dense, prompt, 14, How())
    first = ask(engine, prompt)
    again = ask(engine, prompt)
    assert first["output_ids"] == again["output_ids"] == wanted
    assert again["meta_info"]["cached_tokens"] == (0 if dense.whole else 64)
    longer = [*prompt, *wanted, *prompt[:9]]
    assert ask(engine, longer)["output_ids"] == decode(dense, longer, 14, How())[0]
    # What differs within a block changes all of it: nothing of that block may be shared.
    other = [*prompt[:70], 9, *prompt[71:]]
    assert ask(engine, other)["output_ids"] == decode(dense, other, 14, How())[0]


def test_an_answer_ends_at_its_first_end_though_its_block_is_not_full(served: Any) -> None:
    engine, dense = served
    for prompt in prompts([5, 12]):
        plain, passes = decode(dense, prompt, 14, How())
        end = next(token for at, token in enumerate(plain) if at > 2 and token not in plain[:at])
        wanted, fewer = decode(dense, prompt, 14, How(ends=(end,)))
        found = ask(engine, prompt, stop_token_ids=[end])
        assert found["output_ids"] == wanted == plain[: plain.index(end) + 1]
        assert found["meta_info"]["finish_reason"] == {"type": "stop", "matched": end}
        assert found["meta_info"]["dllm_passes"] == fewer <= passes


def test_logprobs_are_of_the_pass_that_accepted_a_token(served: Any) -> None:
    engine, _ = served
    (prompt,) = prompts([11])
    sampling = {"max_new_tokens": 9, "temperature": 0, "ignore_eos": True}
    found: Any = engine.generate(
        input_ids=prompt, sampling_params=sampling, return_logprob=True, top_logprobs_num=2, token_ids_logprob=[5]
    )
    meta = found["meta_info"]
    assert [token for _, token, _ in meta["output_token_logprobs"]] == found["output_ids"]
    assert all(
        top[0][:2] == own[:2]
        for top, own in zip(meta["output_top_logprobs"], meta["output_token_logprobs"], strict=True)
    )
    assert len(meta["output_token_ids_logprobs"]) == 9


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sdar", "llada2_moe", "llada"])
def test_requests_that_lose_their_pages_give_the_same_answers(name: str, path: Any) -> None:
    dense, some = DENSE[name](path(name)), prompts([18, 25, 33, 40, 9, 50])
    wanted = [decode(dense, prompt, 40, How(temperature=0.9, seed=8))[0] for prompt in some]
    tight = {**SETTINGS, "max_total_tokens": 192, "chunked_prefill_size": 32, "disable_radix_cache": name == "sdar"}
    with phloem.Engine(model_path=str(path(name)), **tight) as engine:
        found = ask(engine, some, 40, temperature=0.9, sampling_seed=8)
        # A text that is seen whole has all its pages from the first step on: it waits, and loses none.
        assert dense.whole or engine.get_server_info()["internal_states"][0]["preemptions"] > 0
    assert [one["output_ids"] for one in found] == wanted


@pytest.mark.some(3)
@needs_native
@pytest.mark.slow
@pytest.mark.parametrize("kept", ["auto", "int8"])
@pytest.mark.parametrize("name", denoisers())
def test_recorded_steps_give_each_request_the_same_answer_alone_and_among_others(
    name: str, kept: str, tmp_path: Path
) -> None:
    """On the native kernels, with caches of 16 or 8 bits; alone, a prefix is found that was computed among others."""
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128}
    sizes |= {} if name in ("llada", "dream") else {"head_dim": 32}
    path, some = tiny_checkpoint(name, tmp_path, **sizes), prompts([3, 17, 40, 64, 9])
    more: dict[str, Any] = {"max_total_tokens": 4096, "chunked_prefill_size": 64, "debug_invariants": True}
    with phloem.Engine(model_path=str(path), kv_cache_dtype=kept, **more) as engine:
        together = [one["output_ids"] for one in ask(engine, some, 20)]
        assert [ask(engine, prompt, 20)["output_ids"] for prompt in some] == together
        info = engine.get_server_info()
    if name == "llada2_moe":  # its router too is an op of the table
        assert info["internal_states"][0]["prepared"]["graphs"]["prefill_graph"]["recorded"]
    # Of 16 bits where the processor multiplies those.
    chosen = next(decision[1] for decision in info["decisions"] if decision[0] == "dtype")
    assert info["kv_cache_dtype"] == (chosen if kept == "auto" else kept)
    assert ["attention_backend", "cpu"] in [decision[:2] for decision in info["decisions"]]


class Starved(CanvasRunner):
    """One for whose every third step there is no memory."""

    count = 0

    def launch(self, batch: Any) -> Any:
        Starved.count += 1
        return self if Starved.count % 3 == 0 else super().launch(batch)

    def result(self) -> Any:
        raise OutOfMemory("made up")


@pytest.mark.parametrize("name", ["sdar", "llada"])
def test_steps_without_memory_never_happened(name: str, path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core, "CanvasRunner", Starved)
    dense, some = DENSE[name](path(name)), prompts([2, 21, 38])
    wanted = [decode(dense, prompt, 12, How(temperature=0.9, seed=8)) for prompt in some]
    settings = {**SETTINGS, "disable_overlap_schedule": True, "chunked_prefill_size": 24}
    with phloem.Engine(model_path=str(path(name)), **settings) as engine:
        found = ask(engine, some, 12, temperature=0.9, sampling_seed=8)
        assert engine.get_server_info()["internal_states"][0]["out_of_memory"] > 2
    assert [one["output_ids"] for one in found] == [tokens for tokens, _ in wanted]


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("regex", {"regex": "a+"}),
        ("frequency_penalty", {"frequency_penalty": 0.5}),
        ("logit_bias", {"logit_bias": {"5": 1.0}}),
        ("min_new_tokens", {"min_new_tokens": 2}),
        ("max_new_tokens", {"max_new_tokens": 0}),
    ],
)
def test_what_has_no_meaning_out_of_order_is_refused_by_name(served: Any, field: str, values: Any) -> None:
    engine, _ = served
    with pytest.raises(BadRequest, match=f"{field}: this model writes by diffusion"):
        ask(engine, [5, 6, 7], **{"max_new_tokens": 4, **values})
    assert len(ask(engine, [5, 6, 7])["output_ids"]) == 14


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"dllm_algorithm": "JointThreshold"}, "edits accepted tokens.*known: LowConfidence"),
        ({"dllm_algorithm_config": {"edit_threshold": 0.5}}, "edit_threshold not known here; known: threshold"),
        ({"dllm_algorithm_config": {"threshold": "high"}}, "threshold is 'high', expected a number"),
        ({"dllm_algorithm_config": {"steps": 5}}, "steps is 5, expected 0 to 4"),
        ({"dllm_algorithm_config": '{"steps": 2, "denoising_steps": 2}'}, "are one setting"),
        ({"dllm_algorithm_config": '{"a":' * 5000}, "is not JSON"),
        ({"dllm_algorithm_config": "a\0b"}, "embedded null byte"),
        ({"dllm_algorithm_config": {"block_size": 1024}}, "blocks of 1024 tokens, but the context holds 512"),
        ({"dllm_algorithm": ""}, "known: LowConfidence"),
        ({"page_size": 6}, "page_size: 6 is no multiple of the model's blocks of 4"),
        ({"speculative_algorithm": "ngram"}, "speculative_algorithm: a model of diffusion"),
        ({"enable_lora": True}, "adapters are served beside"),
        ({"enable_deterministic_inference": True}, "a place sees those behind it"),
        ({"attention_backend": "flashinfer"}, "blocks of positions|flashinfer"),
    ],
)
def test_what_such_a_model_is_not_served_with_is_refused_before_it_is_ready(
    path: Any, settings: Any, words: str
) -> None:
    found = Config.from_flat({"model_path": str(path("sdar")), **SETTINGS, **settings})
    with pytest.raises(ConfigError, match=words):
        worker.build(found, described(found.model), lambda phase, seconds: None)


@pytest.mark.parametrize(("text", "words"), [("1: 2\nfoo: 3", "1, foo not known here"), ("[" * 3000, "not readable")])
def test_a_file_of_settings_that_is_odd_is_named(path: Any, text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "settings.yaml").write_text(text)
    settings = {**SETTINGS, "dllm_algorithm_config": str(tmp_path / "settings.yaml")}
    found = Config.from_flat({"model_path": str(path("sdar")), **settings})
    with pytest.raises(ConfigError, match=words):
        worker.build(found, described(found.model), lambda phase, seconds: None)


@pytest.mark.parametrize(("key", "value"), [("block_size", "x"), ("block_size", 2.5), ("mask_token_id", [1])])
def test_a_checkpoint_whose_block_or_mask_is_no_number_is_named(key: str, value: Any, tmp_path: Path) -> None:
    file = tiny_checkpoint("sdar", tmp_path) / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    found = Config.from_flat({"model_path": str(tmp_path), **SETTINGS})
    with pytest.raises(ModelLoadError, match=f"config.json: {key} is .* expected a whole number"):
        worker.build(found, described(found.model), lambda phase, seconds: None)


def test_a_file_that_writes_its_model_type_with_a_capital_is_of_that_family(tmp_path: Path) -> None:
    file = tiny_checkpoint("dream", tmp_path) / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "model_type": "Dream"}))
    found = describe(str(tmp_path))
    assert found.model_type == found.config["model_type"] == "dream" and found.chosen.impl == "phloem"


@pytest.mark.slow
def test_a_model_of_another_kind_takes_no_algorithm_of_diffusion(tmp_path: Path) -> None:
    found = Config.from_flat({"model_path": str(tiny_checkpoint("llama", tmp_path)), "dllm_algorithm": "LowConfidence"})
    with pytest.raises(ConfigError, match="llama does not write by diffusion"):
        worker.build(found, described(found.model), lambda phase, seconds: None)
