"""What is served with an adapter has the logits of PEFT's model, and of the checkpoint that `phloem merge` writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_support import TARGETS, logprobs, ours, write_adapter

from phloem import Engine
from phloem.cli import main
from phloem.testing.checkpoints import VOCAB, tiny_checkpoint

pytest.importorskip("peft", reason="PEFT says what is right")
pytestmark = pytest.mark.slow
TOKENS = [7, 99, 31, 250, 12, 12, 301, 44, 5, 180]
PARAMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "some targets": {"target_modules": ["q_proj", "up_proj"]},
    "v alone": {"target_modules": ["v_proj"], "r": 7},
    "regex": {"target_modules": r".*layers\.[02]\.(self_attn\.[qkvo]_proj|mlp\.down_proj)"},
    "all-linear": {"target_modules": "all-linear"},
    "rslora": {"use_rslora": True, "lora_alpha": 3},
    "patterns": {
        "rank_pattern": {"k_proj": 2, r"layers\.1\.mlp\.up_proj": 9},
        "alpha_pattern": {"layers.0.self_attn.o_proj": 20},
    },
    "dora": {"use_dora": True},
    "dora of some": {"use_dora": True, "target_modules": ["k_proj", "down_proj"]},
    "lora_bias": {"lora_bias": True},
    "layers": {"layers_to_transform": [1], "layers_pattern": "layers"},
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: tiny_checkpoint(name, tmp_path_factory.mktemp(name)) for name in ("llama", "qwen2")}


@pytest.fixture(scope="module")
def engines(bases: dict[str, Path]) -> Any:
    made = {
        name: Engine(
            model_path=str(path), dtype="float32", ops="reference", max_total_tokens=4096, enable_lora=True,
            max_lora_rank=16, debug_invariants=True,
        )
        for name, path in bases.items()
    }  # fmt: skip
    yield made
    for engine in made.values():
        engine.shutdown()


@pytest.mark.some(7)
@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("kind", PARAMS)
def test_logits_are_those_of_peft(
    family: str, kind: str, bases: dict[str, Path], engines: dict[str, Engine], tmp_path: Path
) -> None:
    adapter = write_adapter(bases[family], tmp_path / "adapter", **PARAMS[kind])
    engine = engines[family]
    engine.load_lora_adapter("one", str(adapter))
    want = logprobs(bases[family], adapter, TOKENS)[:-1]
    found = ours(engine, TOKENS, VOCAB, lora_path="one")
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4)
    base = logprobs(bases[family], None, TOKENS)[:-1]
    assert (want - base).abs().max() > 0.05  # an adapter that does nothing would prove nothing
    torch.testing.assert_close(ours(engine, TOKENS, VOCAB), base, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_trained_biases_stand_in_for_the_bases(
    bases: dict[str, Path], engines: dict[str, Engine], tmp_path: Path
) -> None:
    """As PEFT's `bias="lora_only"` saves them; q, k and v of this family have biases."""
    from safetensors.torch import load_file, save_file

    adapter = write_adapter(bases["qwen2"], tmp_path / "adapter", target_modules=["q_proj", "v_proj"])
    file, base = adapter / "adapter_model.safetensors", load_file(bases["qwen2"] / "model.safetensors")
    tensors = load_file(file)
    generator = torch.Generator().manual_seed(3)
    for key, bias in base.items():
        if key.endswith(("q_proj.bias", "v_proj.bias")):
            tensors[f"base_model.model.{key}"] = bias + torch.randn(bias.shape, generator=generator)
    save_file(tensors, file)
    merged = tmp_path / "merged"
    assert main(["merge", str(bases["qwen2"]), str(adapter), str(merged)]) == 0
    engines["qwen2"].load_lora_adapter("biased", str(adapter))
    found = ours(engines["qwen2"], TOKENS, VOCAB, lora_path="biased")
    torch.testing.assert_close(found, logprobs(merged, None, TOKENS)[:-1], rtol=1e-4, atol=1e-4)
    assert (found - ours(engines["qwen2"], TOKENS, VOCAB)).abs().max() > 0.05


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "rslora", "patterns", "dora"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_merged_checkpoint_is_the_adapted_model(
    family: str, kind: str, bases: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter, out = write_adapter(bases[family], tmp_path / "adapter", **PARAMS[kind]), tmp_path / "merged"
    assert main(["merge", str(bases[family]), str(adapter), str(out)]) == 0
    assert "21 tensors changed" in capsys.readouterr().out
    want = logprobs(bases[family], adapter, TOKENS)
    torch.testing.assert_close(logprobs(out, None, TOKENS), want, rtol=1e-4, atol=1e-4)
    assert not (tmp_path / "merged.partial").exists()


def test_heads_and_embeddings_are_merged_and_a_tied_head_is_written_out(tmp_path: Path) -> None:
    base = tiny_checkpoint("llama", tmp_path / "base", tie_word_embeddings=True, shards=3)
    adapter = write_adapter(base, tmp_path / "adapter", target_modules=["q_proj", "embed_tokens"])
    out = tmp_path / "merged"
    assert main(["merge", str(base), str(adapter), str(out)]) == 0
    torch.testing.assert_close(logprobs(out, None, TOKENS), logprobs(base, adapter, TOKENS), rtol=1e-4, atol=1e-4)
    with Engine(model_path=str(out), dtype="float32", ops="reference", max_total_tokens=1024) as engine:
        found = ours(engine, TOKENS, VOCAB)
    torch.testing.assert_close(found, logprobs(base, adapter, TOKENS)[:-1], rtol=1e-4, atol=1e-4)


def test_a_merge_that_cannot_be_leaves_nothing_behind(
    bases: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wide = tiny_checkpoint("llama", tmp_path / "wide", hidden_size=48)
    adapter = write_adapter(wide, tmp_path / "adapter")
    assert main(["merge", str(bases["llama"]), str(adapter), str(tmp_path / "out")]) == 1
    assert "another base" in capsys.readouterr().err
    assert main(["merge", str(tmp_path / "nothing"), str(adapter), str(tmp_path / "out")]) == 1
    assert main(["merge", str(bases["llama"]), str(tmp_path), str(tmp_path / "out")]) == 1
    assert "adapter_config.json" in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))
    assert main(["merge", str(bases["llama"]), str(adapter), str(wide)]) == 1
    assert "is there already" in capsys.readouterr().err
    assert TARGETS
