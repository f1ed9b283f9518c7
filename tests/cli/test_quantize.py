"""`phloem quantize`: what it writes is loaded here and by the format's own library; bad input is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from model_support import CPU, PROMPT, Engine
from safetensors.torch import load_file

from phloem import cli
from phloem.checkpoint.describe import describe
from phloem.kernels import native
from phloem.kernels.ops import Ops
from phloem.layers.context import BuildContext
from phloem.models import load_model
from phloem.quant import method_for
from phloem.testing.checkpoints import tiny_checkpoint, tiny_gguf

SIZES = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "num_hidden_layers": 2}
LIMITS = {"int4": 0.12, "int8": 0.01, "fp8": 0.035}  # of the weights' errors, normally distributed ones


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("llama", tmp_path_factory.mktemp("made"), **SIZES)


def quantize(path: Path, out: Path, *options: str) -> int:
    return cli.main(["quantize", str(path), str(out), *options])


@pytest.mark.parametrize("kind", LIMITS)
def test_what_is_written_is_near_and_is_loaded(
    made: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert quantize(made, tmp_path / "out", "--to", kind, "--group-size", "32") == 0
    told = capsys.readouterr()
    assert f"14 matrices in {kind}" in told.out and "100%" in told.err
    whole, few = Engine(made), Engine(tmp_path / "out")
    assert few.checkpoint.stored is not None
    for name in whole.model.weight_names():
        wanted, got = whole.model.get_weight(name), few.model.get_weight(name)
        error = (got - wanted).norm() / wanted.norm()
        assert error < LIMITS[kind] and (error > 0) == ("_proj" in name), name
    assert (few.whole(PROMPT) - whole.whole(PROMPT)).norm() < 4 * LIMITS[kind] * whole.whole(PROMPT).norm()
    assert {file.name for file in (tmp_path / "out").iterdir()} >= {"config.json", "tokenizer.json"}
    sizes = [sum(file.stat().st_size for file in folder.glob("*.safetensors")) for folder in (tmp_path / "out", made)]
    assert sizes[0] < sizes[1] * 0.6


@pytest.mark.parametrize("kind", ["int4", "int8"])
def test_the_native_table_keeps_what_is_written(made: Path, tmp_path: Path, kind: str) -> None:
    try:
        ops = native.table(1)
    except native.Unavailable as reason:
        pytest.skip(str(reason))
    quantize(made, tmp_path / "out", "--to", kind)
    checkpoint = describe(str(tmp_path / "out"))
    method = method_for(None, checkpoint.stored)
    assert method is not None and method.report is not None
    load_model(checkpoint, BuildContext(ops, torch.bfloat16, CPU, quant=method))
    assert "14 matrices keep their bits as " + {"int4": "Q4_1", "int8": "Q8_0"}[kind] in method.report.decision("x")[1]


@pytest.mark.slow
@pytest.mark.parametrize("kind", LIMITS)
def test_transformers_reads_the_same_values(made: Path, tmp_path: Path, kind: str) -> None:
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    quantize(made, tmp_path / "out", "--to", kind)
    config: Any = CompressedTensorsConfig(run_compressed=False)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, quantization_config=config)
    # Activations of 8 bits are the engine's choice: the weights are what is compared.
    theirs = {name: value for name, value in model.state_dict().items() if name.endswith("_proj.weight")}
    ours = load_model(describe(str(tmp_path / "out")), BuildContext(Ops(), torch.float32, CPU))
    assert len(theirs) == 14
    for name, value in theirs.items():
        torch.testing.assert_close(ours.get_weight(name), value.float(), rtol=1e-6, atol=1e-7)


def test_routers_the_head_and_kept_modules_stay_as_they_are(tmp_path: Path) -> None:
    path = tiny_checkpoint("mixtral", tmp_path / "made", hidden_size=64, intermediate_size=64)
    assert quantize(path, tmp_path / "out", "--to", "int8", "--keep", "*.layers.0.self_attn.*") == 0
    stored = load_file(tmp_path / "out" / "model.safetensors")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    plain = {name for name, tensor in stored.items() if tensor.ndim == 2 and tensor.dtype == torch.float32}
    plain = {name for name in plain if not name.endswith("_scale")}
    assert "lm_head.weight" in plain and "model.embed_tokens.weight" in plain
    assert "model.layers.0.self_attn.q_proj.weight" in plain and "model.layers.1.self_attn.q_proj.weight" not in plain
    assert any("gate.weight" in name for name in plain), "the router"
    assert {name.removesuffix(".weight") for name in plain} <= set(config["ignore"])
    whole, few = Engine(path), Engine(tmp_path / "out")
    # A router may choose otherwise where two experts are close: most tokens are near.
    apart = (few.whole(PROMPT) - whole.whole(PROMPT)).abs().amax(-1)
    assert apart.median() < 0.1


def test_shards_are_kept_and_indexed(made: Path, tmp_path: Path) -> None:
    path = tiny_checkpoint("llama", tmp_path / "made", shards=3, **SIZES)
    assert quantize(path, tmp_path / "out", "--to", "int8") == 0
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) >= 3
    assert quantize(made, tmp_path / "one", "--to", "int8") == 0
    assert torch.equal(Engine(tmp_path / "out").whole(PROMPT), Engine(tmp_path / "one").whole(PROMPT))


def test_bad_input_is_refused_by_name(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*arguments: str) -> str:
        assert cli.main(["quantize", *arguments]) == 1
        return capsys.readouterr().err

    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").touch()
    assert "a model and a directory to write are needed" in refused()
    assert "exists and is not empty" in refused(str(made), str(tmp_path / "full"))
    assert "group_size: 48 is not one of 32, 64, 128" in refused(str(made), str(tmp_path / "x"), "--group-size", "48")
    assert "no such file or directory" in refused(str(tmp_path / "no" / "model"), str(tmp_path / "x"))
    assert "no matrix" in refused(str(made), str(tmp_path / "x"), "--keep", "*")
    assert quantize(made, tmp_path / "out", "--to", "fp8") == 0
    assert "is quantised already (compressed-tensors)" in refused(str(tmp_path / "out"), str(tmp_path / "x"))
    file = tiny_gguf(made, tmp_path / "tiny.gguf")
    assert "quantize reads safetensors, and this is gguf" in refused(str(file), str(tmp_path / "x"))
    assert not (tmp_path / "x" / "config.json").exists()


def test_numbers_that_are_none_are_refused(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from model_support import edited

    def spoil(stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        stored["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
        return stored

    path = edited(made, tmp_path / "bad", spoil)
    assert quantize(path, tmp_path / "out") == 1
    assert "model.layers.1.mlp.up_proj.weight has numbers that are none" in capsys.readouterr().err
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("kind", LIMITS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rows_of_zeros_and_small_ones_stay_numbers(made: Path, tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    from model_support import edited

    def few(stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        stored["model.layers.1.mlp.up_proj.weight"][:8] = 0
        stored["model.layers.1.mlp.up_proj.weight"][8:16] *= 1e-3
        return {name: tensor.to(dtype) for name, tensor in stored.items()}

    assert quantize(edited(made, tmp_path / "few", few), tmp_path / "out", "--to", kind) == 0
    checkpoint = describe(str(tmp_path / "out"))
    method = method_for(None, checkpoint.stored)
    assert method is not None and method.report is not None
    model = load_model(checkpoint, BuildContext(Ops(), torch.float32, CPU, quant=method))
    got = model.get_weight("model.layers.1.mlp.up_proj.weight")
    assert not got[:8].any() and got.isfinite().all() and got[8:16].any()
    assert kind == "fp8" or "do not fit" not in method.report.decision("float32")[1]


@pytest.mark.parametrize("family", ["gemma3n_text", "opt"])
def test_tables_that_are_read_by_row_stay_as_they_are(tmp_path: Path, family: str) -> None:
    path = tiny_checkpoint(family, tmp_path / "made")
    assert quantize(path, tmp_path / "out", "--to", "int8") == 0
    stored = load_file(tmp_path / "out" / "model.safetensors")
    tables = [name for name in stored if "embed" in name.split(".")[-2]]
    assert len(tables) > 1 and all(stored[name].dtype == torch.float32 for name in tables)


def test_a_model_of_tables_and_transposed_matrices_has_nothing_to_quantise(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert quantize(tiny_checkpoint("gpt2", tmp_path / "made"), tmp_path / "out", "--to", "int8") == 1
    assert "no matrix of its own" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_checkpoint_that_could_not_be_served_is_not_quantised(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from model_support import edited

    few = edited(made, tmp_path / "few", lambda all_: {k: v for k, v in all_.items() if k != "model.norm.weight"})
    assert quantize(few, tmp_path / "out", "--to", "int8") == 1
    assert "1 tensors are missing: model.norm.weight" in capsys.readouterr().err and not (tmp_path / "out").exists()
