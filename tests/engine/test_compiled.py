"""Serving by steps that are compiled whole: the reference's tokens through HTTP, and what is refused at the start."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file
from served import Server

from phloem import Engine, platforms
from phloem.core.errors import ConfigError, ModelLoadError
from phloem.engine.compiled import CompiledModel, bucket
from phloem.testing.checkpoints import tiny_checkpoint

pytestmark = pytest.mark.slow
jax = pytest.importorskip("jax")

LONG = "The quick brown fox jumps over the lazy dog, and the dog does not mind. " * 2
PROMPTS = [LONG, "A serving engine", LONG + "What is the capital?", "Sap moves through the phloem of a tree."]
GREEDY = {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True}
DRAWN = {"temperature": 0.8, "top_p": 0.9, "max_new_tokens": 10, "sampling_seed": 5, "ignore_eos": True}
DIGITS = {"temperature": 0, "max_new_tokens": 12, "regex": "[0-9]{3}-[0-9]{4}"}
SIZES = {"dtype": "float32", "max_total_tokens": 1024, "chunked_prefill_size": 32, "max_running_requests": 4}


def test_sizes_are_powers_of_two_up_to_the_largest() -> None:
    assert [bucket(count, 16, 100) for count in (1, 16, 17, 64, 65, 100)] == [16, 16, 32, 64, 100, 100]
    assert bucket(3, 1, 2) == 3  # more than was thought of is no error


def test_logits_of_many_positions_of_a_prompt_are_compiled_for_few_sizes() -> None:
    class Sizes:
        def function(self, name: str, function: Any) -> Any:
            del name, function
            return lambda arrays: sizes.append(len(arrays[0])) or arrays[0]

    sizes: list[int] = []
    model: Any = SimpleNamespace(attention_specs=[], memory=[], vocab_size=8, hidden_size=2)
    compiler: Any = Sizes()
    head = CompiledModel(model, compiler, 6).head
    assert [len(head(torch.ones(count, 2))) for count in (1, 3, 5, 6, 7, 9, 13, 109)] == [1, 3, 5, 6, 7, 9, 13, 109]
    assert sizes == [1, 4, 6, 6, 8, 16, 16, 128]


def test_served_by_jax_through_http_the_tokens_are_those_of_the_reference_table(tmp_path: Path) -> None:
    """A window and a full layer, prompts in chunks, several in flight, prefix hits, a grammar, draws, logprobs; then
    other weights from disk, without compiling again."""
    path = tiny_checkpoint("gemma3_text", tmp_path / "first")
    other = tiny_checkpoint("gemma3_text", tmp_path / "other", seed=3)
    asked = [(text, GREEDY) for text in PROMPTS] + [("Tel. ", DIGITS), ("The", DRAWN)]
    with Engine(model_path=str(path), device="cpu", ops="reference", page_size=16, **SIZES) as engine:  # pyright: ignore[reportArgumentType]
        wanted: list[Any] = [
            engine.generate(text, params, return_logprob=True, logprob_start_len=0) for text, params in asked
        ]
    with Engine(model_path=str(other), device="cpu", ops="reference", **SIZES) as engine:  # pyright: ignore[reportArgumentType]
        others: Any = engine.generate(PROMPTS[2], GREEDY)
    options = [f"--{name.replace('_', '-')}={value}" for name, value in SIZES.items()]
    server = Server(path, "--device", "jax", *options)
    try:
        server.wait_ready()

        def ask(text: str, params: dict[str, Any]) -> dict[str, Any]:
            body = {"text": text, "sampling_params": params, "return_logprob": True, "logprob_start_len": 0}
            return httpx.post(server.url + "/generate", json=body, timeout=120).json()

        with ThreadPoolExecutor(6) as clients:
            found = list(clients.map(ask, *zip(*asked, strict=True)))
        body = {"text": PROMPTS[2], "sampling_params": GREEDY}
        again = httpx.post(server.url + "/generate", json=body, timeout=120).json()
        compiled = sum("compiled for inputs of" in line for line in server.lines)
        changed = httpx.post(server.url + "/update_weights_from_disk", json={"model_path": str(other)}, timeout=60)
        asleep = httpx.post(server.url + "/release_memory_occupation", json={}, timeout=60)
        renewed = httpx.post(server.url + "/generate", json=body, timeout=120).json()
        assert sum("compiled for inputs of" in line for line in server.lines) == compiled
        log = "\n".join(server.lines)
    finally:
        server.close()
    assert changed.status_code == 200, changed.text
    assert asleep.status_code == 400 and "(jax, tpu) is not given back" in asleep.text
    assert renewed["output_ids"] == others["output_ids"] != again["output_ids"]
    assert again["output_ids"] == wanted[2]["output_ids"]
    for one, other in zip(found, wanted, strict=True):
        assert one["output_ids"] == other["output_ids"]
        for what in ("input_token_logprobs", "output_token_logprobs"):
            ours, theirs = ([value[0] or 0 for value in answer["meta_info"][what]] for answer in (one, other))
            assert ours == pytest.approx(theirs, abs=1e-4)
    assert again["meta_info"]["cached_tokens"] >= 32
    assert "compiled for inputs of" in log and "compiled_steps" in log


@pytest.fixture
def quick() -> Iterator[None]:
    """Of engines in this process: tiny models take longer to compile than to compute."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.mark.usefixtures("quick")
def test_recurrent_layers_served_by_jax_give_the_tokens_of_the_reference_table(tmp_path: Path) -> None:
    """Short convolutions beside attention: states of several rows, prompts in chunks, a prefix's states found again;
    then other weights from tensors."""
    path, texts = tiny_checkpoint("lfm2", tmp_path), [LONG, "Sap", LONG + "What is the capital?"]
    found: list[list[list[int]]] = []
    made = load_file(tiny_checkpoint("lfm2", tmp_path / "other", seed=3) / "model.safetensors")
    for settings in ({"device": "cpu", "ops": "reference", "page_size": 16}, {"device": "jax"}):
        with Engine(model_path=str(path), **settings, **SIZES) as engine:  # pyright: ignore[reportArgumentType]
            answers: Any = engine.generate(texts, GREEDY)
            again: Any = engine.generate(texts[2], GREEDY)
            # Matrices, which the table keeps itself, a convolution and norms, which it copies.
            names = [name for name in made if ".layers.0." in name]
            engine.update_weights_from_tensor([(name, made[name]) for name in names])
            changed: Any = engine.generate(texts, GREEDY)
        assert again["meta_info"]["cached_tokens"] >= 32 and len(names) > 6
        found.append([one["output_ids"] for one in (*answers, again, *changed)])
    assert found[0] == found[1] and found[1][2] == found[1][3] and found[1][:3] != found[1][4:]


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"enable_lora": True}, "enable_lora"),
    ({"speculative_algorithm": "suffix"}, "speculative_algorithm"),
    ({"quantization": "int8"}, "quantization"),
    ({"kv_cache_dtype": "fp8_e4m3"}, "kv_cache_dtype"),
    ({"pp_size": 2}, "pp_size"),
    ({"tp_size": 8}, "tp_size 8: 4 attention heads and 2 kv heads cannot be shared out"),
    ({"tp_size": 2}, "tp_size 2: jax sees 1 device"),
    ({"enable_hierarchical_cache": True}, "enable_hierarchical_cache"),
    ({"kt_weight_path": "."}, "kt_weight_path"),
    ({"ops": "native"}, "ops"),
]


@pytest.mark.parametrize(
    ("settings", "name"),
    [pytest.param(*one, id=one[1]) for one in REFUSED],
)
def test_what_compiled_steps_do_not_serve_is_refused_by_name(
    settings: dict[str, Any], name: str, tmp_path: Path
) -> None:
    path = tiny_checkpoint("llama", tmp_path)
    with pytest.raises((ConfigError, ModelLoadError), match=name):
        Engine(model_path=str(path), device="jax", **settings)


@pytest.mark.parametrize(("family", "what"), [("llada2_moe", "diffusion"), ("bert", "embed")])
def test_models_that_compiled_steps_do_not_serve_are_refused(family: str, what: str, tmp_path: Path) -> None:
    path = tiny_checkpoint(family, tmp_path)
    with pytest.raises(ConfigError, match=what):
        Engine(model_path=str(path), device="jax")


def test_what_runs_op_by_op_has_no_such_device() -> None:
    with pytest.raises(ConfigError, match="op by op"):
        platforms.choose("jax", 1)


def test_a_tpu_is_refused_with_the_reason_where_there_is_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="jax sees no TPU"):
        Engine(model_path=str(tiny_checkpoint("llama", tmp_path)), device="tpu")
