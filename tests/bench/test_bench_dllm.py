"""`phloem bench dllm`: the same requests alone and together, and what is refused before anything is measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from phloem.bench import dllm
from phloem.bench._dllm_profile import HEAD, REST, SHAPES, write_shape
from phloem.checkpoint.describe import describe
from phloem.core.errors import BadRequest
from phloem.kernels import native
from phloem.testing.checkpoints import tiny_checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    path = tiny_checkpoint("dream", tmp_path_factory.mktemp("tiny"))
    return ["--model-path", str(path), "--dtype", "float32", "--threads", "1", "--max-total-tokens", "1024"]


def test_a_tiny_model_is_measured_and_answers_the_same_alone_and_together(model: list[str], tmp_path: Path) -> None:
    sizes = ["--requests", "3", "--in-flight", "2", "--prompt-tokens", "7", "--tokens", "9"]
    assert dllm.main([*model, *sizes, "--output", str(tmp_path / "found")]) == 0
    found = json.loads((tmp_path / "found").read_text())
    assert found["same_answers"] == 3 and 0 < found["tokens_per_forward"] <= 1


@pytest.mark.parametrize("even", [False, True])
def test_a_pass_is_told_by_its_parts(even: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tiny_checkpoint("llada2_moe", tmp_path / "model")
    settings = ["--model-path", str(path), "--dtype", "bfloat16", "--threads", "1", "--max-total-tokens", "1024"]
    sizes = ["--requests", "3", "--in-flight", "3", "--prompt-tokens", "9", "--tokens", "16", "--profile"]
    out = tmp_path / "found"
    assert dllm.main([*settings, *sizes, *(["--even"] if even else []), "--output", str(out)]) == 0
    found = json.loads(out.read_text())
    assert (found["same_answers"], found["even"]) == (3, even)
    for parts in (found["alone_ms"], found["together_ms"]):
        assert {HEAD, REST} < set(parts) and all(took > 0 for name, took in parts.items() if name != REST)
    if native_is_there():
        assert {"moe", "linear"} < set(found["alone_ms"]) and found["eager"] == [0, 0]
    assert "| head and choice |" in capsys.readouterr().out


def native_is_there() -> bool:
    try:
        native.runtime()
    except native.Unavailable:
        return False
    return True


def test_a_shape_has_the_whole_models_layers_and_a_part_of_its_vocabulary(tmp_path: Path) -> None:
    for name, (_, layers, vocabulary) in SHAPES.items():
        made = json.loads(write_shape(name, 2, tmp_path).read_text())
        assert made["num_hidden_layers"] == 2 and made["vocab_size"] == vocabulary * 2 // layers
        assert made["mask_token_id"] == made["vocab_size"] - 1
        described = describe(str(tmp_path / "config.json"), "dummy")
        assert described.model_type == made["model_type"]
    for name, layers, says in (("none", 2, "shape"), ("sdar_1_7b", 0, "layers"), ("sdar_1_7b", 29, "layers")):
        with pytest.raises(BadRequest, match=says):
            write_shape(name, layers, tmp_path)


@pytest.mark.parametrize("option", ["--requests", "--in-flight", "--prompt-tokens", "--tokens"])
def test_nothing_is_measured_of_nothing(model: list[str], option: str) -> None:
    with pytest.raises(BadRequest, match="at least 1"):
        dllm.main([*model, option, "0"])


def test_an_answer_that_would_be_cut_is_refused(model: list[str]) -> None:
    with pytest.raises(BadRequest, match=r"48 \+ 500 tokens: 512 fit"):
        dllm.main([*model, "--tokens", "500"])
