"""`phloem bench dllm`: the same requests alone and together, and what is refused before anything is measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from phloem.bench import dllm
from phloem.core.errors import BadRequest
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


@pytest.mark.parametrize("option", ["--requests", "--in-flight", "--prompt-tokens", "--tokens"])
def test_nothing_is_measured_of_nothing(model: list[str], option: str) -> None:
    with pytest.raises(BadRequest, match="at least 1"):
        dllm.main([*model, option, "0"])


def test_an_answer_that_would_be_cut_is_refused(model: list[str]) -> None:
    with pytest.raises(BadRequest, match=r"48 \+ 500 tokens: 512 fit"):
        dllm.main([*model, "--tokens", "500"])
