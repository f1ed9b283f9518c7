"""Additions to experts: of one expert's matrices by name, and of tensors that stack them, beside rows without."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_support import logprobs, ours, write_adapter
from native_support import built
from safetensors.torch import load_file, save_file

from phloem import Engine
from phloem.cli import main
from phloem.core.errors import PhloemError
from phloem.testing.checkpoints import VOCAB, tiny_checkpoint

pytest.importorskip("peft", reason="PEFT says what is right")
pytestmark = pytest.mark.slow
TOKENS = [7, 99, 31, 250, 12, 12, 301, 44, 5, 180]
GREEDY: dict[str, Any] = {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True}
FAMILIES = ["qwen3_moe", "mixtral"]
STACKED = {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: tiny_checkpoint(name, tmp_path_factory.mktemp(name)) for name in FAMILIES}


def engine_of(path: Path, **settings: Any) -> Engine:
    usual: dict[str, Any] = {"dtype": "float32", "ops": "reference", "max_total_tokens": 4096, "max_lora_rank": 16}
    return Engine(model_path=str(path), **{**usual, "enable_lora": True, "debug_invariants": True, **settings})


@pytest.fixture(scope="module")
def engines(bases: dict[str, Path]) -> Iterator[dict[str, Engine]]:
    made = {name: engine_of(path) for name, path in bases.items()}
    yield made
    for engine in made.values():
        engine.shutdown()


def of_experts(base: Path, out: Path, which: str = ".*", rank: int = 3, seed: int = 0, **config: Any) -> Path:
    """An adapter of single experts' matrices whose names `which` finds, by the names that the checkpoint has."""
    generator, found = torch.Generator().manual_seed(seed), dict[str, torch.Tensor]()
    for key, weight in load_file(base / "model.safetensors").items():
        name = key.removesuffix(".weight")
        if re.search(rf"\.experts\.\d+\.(?:{which})$", name):
            outputs, inputs = weight.shape
            found[f"base_model.model.{name}.lora_A.weight"] = torch.randn(rank, inputs, generator=generator) * 0.4
            found[f"base_model.model.{name}.lora_B.weight"] = torch.randn(outputs, rank, generator=generator) * 0.4
    out.mkdir()
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, **config}
    (out / "adapter_config.json").write_text(json.dumps(settings))
    save_file(found, out / "adapter_model.safetensors")
    return out


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("which", [".*", "down_proj|w2", "up_proj|w3", "gate_proj|w1"])
def test_additions_to_single_experts_are_those_of_a_merged_checkpoint(
    family: str, which: str, bases: dict[str, Path], engines: dict[str, Engine], tmp_path: Path
) -> None:
    adapter, engine = of_experts(bases[family], tmp_path / "adapter", which), engines[family]
    assert main(["merge", str(bases[family]), str(adapter), str(tmp_path / "merged")]) == 0
    engine.load_lora_adapter("one", str(adapter))
    want = logprobs(tmp_path / "merged", None, TOKENS)[:-1]
    torch.testing.assert_close(ours(engine, TOKENS, VOCAB, lora_path="one"), want, rtol=1e-4, atol=1e-4)
    base = logprobs(bases[family], None, TOKENS)[:-1]
    assert (want - base).abs().max() > 0.02
    torch.testing.assert_close(ours(engine, TOKENS, VOCAB), base, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("targets", [STACKED["target_parameters"], ["mlp.experts.down_proj"]])
def test_additions_to_stacked_experts_are_those_of_peft(
    family: str, targets: list[str], bases: dict[str, Path], engines: dict[str, Engine], tmp_path: Path
) -> None:
    adapter = write_adapter(
        bases[family], tmp_path / "adapter", target_modules=["q_proj"], target_parameters=targets, strong=2.0
    )
    engines[family].load_lora_adapter("stacked", str(adapter))
    want = logprobs(bases[family], adapter, TOKENS)[:-1]
    found = ours(engines[family], TOKENS, VOCAB, lora_path="stacked")
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4)
    alone = write_adapter(bases[family], tmp_path / "alone", target_modules=["q_proj"], strong=2.0)
    assert (want - logprobs(bases[family], alone, TOKENS)[:-1]).abs().max() > 0.02


TABLES = [
    pytest.param({}, id="reference"),
    pytest.param(
        {"ops": "native", "dtype": "auto"},
        id="native",
        marks=pytest.mark.skipif(not built(), reason="the native library is not built"),
    ),
]


@pytest.mark.parametrize("settings", TABLES)
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_with_and_without_in_one_batch_give_what_each_gives_alone(
    family: str, settings: dict[str, Any], bases: dict[str, Path], tmp_path: Path
) -> None:
    some = of_experts(bases[family], tmp_path / "some", "(?:down_proj|w2)", seed=1)
    every = of_experts(bases[family], tmp_path / "every", seed=2)
    plain = write_adapter(bases[family], tmp_path / "plain", target_modules=["q_proj", "v_proj"], strong=2.0)
    names, prompts = ["some", None, "every", "plain"], [[7, 99, 31], [7, 99, 31], [5, 180, 44, 44], [250]]
    with engine_of(bases[family], **settings) as engine:
        before: Any = engine.generate(input_ids=prompts[1], sampling_params=GREEDY)
        for name, folder in (("some", some), ("every", every), ("plain", plain)):
            engine.load_lora_adapter(name, str(folder))
        alone: Any = [
            engine.generate(input_ids=prompt, sampling_params=GREEDY, lora_path=name)
            for prompt, name in zip(prompts, names, strict=True)
        ]
        together: Any = engine.generate(input_ids=prompts, sampling_params=GREEDY, lora_path=names)
        assert [one["output_ids"] for one in together] == [one["output_ids"] for one in alone]
        assert together[1]["output_ids"] == before["output_ids"] != together[0]["output_ids"]


@pytest.mark.skipif(not built(), reason="the native library is not built")
def test_a_token_has_its_bits_in_any_company_and_as_part_of_a_prompt(bases: dict[str, Path], tmp_path: Path) -> None:
    base, prompts = bases["qwen3_moe"], [[7, 99, 31], [5, 180, 44, 44, 9, 12], [250]]
    adapter = of_experts(base, tmp_path / "every", seed=2)
    with engine_of(base, ops="invariant", disable_radix_cache=True) as engine:
        engine.load_lora_adapter("every", str(adapter))
        asked: dict[str, Any] = {"sampling_params": GREEDY, "lora_path": "every", "return_logprob": True}
        several: Any = engine.generate(input_ids=prompts, **asked)
        for prompt, one in zip(prompts, several, strict=True):
            alone: Any = engine.generate(input_ids=prompt, **asked)
            scored = {**asked, "sampling_params": {"max_new_tokens": 0}, "logprob_start_len": 0}
            later: Any = engine.generate(input_ids=[*prompt, *one["output_ids"]], **scored)
            found = [value for value, *_ in one["meta_info"]["output_token_logprobs"]]
            assert found == [value for value, *_ in alone["meta_info"]["output_token_logprobs"]]
            assert found == [value for value, *_ in later["meta_info"]["input_token_logprobs"]][len(prompt) :]


BAD: list[tuple[dict[str, tuple[int, ...]], dict[str, Any], str]] = [
    ({"experts.9.gate_proj.lora_A.weight": (3, 32), "experts.9.gate_proj.lora_B.weight": (24, 3)}, {}, r"experts\.9"),
    ({"experts.1.gate_proj.lora_A.weight": (3, 31), "experts.1.gate_proj.lora_B.weight": (24, 3)}, {}, "31 inputs"),
    ({"experts.1.side_proj.lora_A.weight": (3, 32), "experts.1.side_proj.lora_B.weight": (24, 3)}, {}, "side_proj"),
    ({"experts.1.gate_proj.weight": (24, 32)}, {}, r"experts\.1\.gate_proj \(whole"),
    (
        {"experts.lora_A.weight": (18, 32), "experts.lora_B.weight": (47, 18)},
        {"target_parameters": ["experts.gate_up_proj"]},
        r"lora_A \[18, 32\], lora_B \[47, 18\] for 6 experts",
    ),
    ({"experts.lora_A.weight": (3, 32), "experts.lora_B.weight": (48, 3)}, {}, "for 6 experts"),
    (
        {
            "experts.1.gate_proj.lora_A.weight": (3, 32),
            "experts.1.gate_proj.lora_B.weight": (24, 3),
            "experts.1.gate_proj.lora_magnitude_vector": (24,),
        },
        {},
        "no DoRA",
    ),
]


@pytest.mark.parametrize(("tensors", "config", "names"), BAD)
def test_what_does_not_fit_is_refused_by_name(
    tensors: dict[str, tuple[int, ...]], config: dict[str, Any], names: str, engines: dict[str, Engine], tmp_path: Path
) -> None:
    folder = tmp_path / "bad"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 3, "lora_alpha": 3, **config}))
    prefix = "base_model.model.model.layers.1.mlp."
    save_file({prefix + k: torch.ones(shape) for k, shape in tensors.items()}, folder / "adapter_model.safetensors")
    with pytest.raises(PhloemError, match=names):
        engines["qwen3_moe"].load_lora_adapter("bad", str(folder))
    with pytest.raises(PhloemError, match="no adapter 'bad'"):
        engines["qwen3_moe"].generate(input_ids=TOKENS, sampling_params=GREEDY, lora_path="bad")


def test_ranks_of_experts_have_the_same_bound(bases: dict[str, Path], tmp_path: Path) -> None:
    adapter = of_experts(bases["mixtral"], tmp_path / "adapter", rank=9)
    with engine_of(bases["mixtral"], max_lora_rank=8) as engine, pytest.raises(PhloemError, match="rank is 9, at most"):
        engine.load_lora_adapter("high", str(adapter))
