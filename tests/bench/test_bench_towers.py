"""The benchmark of towers: what it compares is the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from vision_support import seeing_checkpoint

from phloem.bench import towers
from phloem.core.errors import BadRequest
from phloem.testing.checkpoints import tiny_checkpoint

SETTINGS = ["--dtype", "float32", "--threads", "1", "--rounds", "1", "--width", "40", "--height", "24"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2_5_vl", "llava"])
def test_ours_and_theirs_make_the_same_of_pictures(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, output = seeing_checkpoint(name, tmp_path / "model"), tmp_path / "out.jsonl"
    assert towers.main(["--model-path", str(path), *SETTINGS, "--pictures", "3", "--output", str(output)]) == 0
    record: dict[str, Any] = json.loads(output.read_text())
    assert set(record["ms"]) == {"phloem", "transformers"}
    assert record["apart"] < 1e-4 and record["tokens"] > 3
    assert "x transformers' speed" in capsys.readouterr().out


def test_a_model_of_texts_has_no_tower(tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="takes pictures"):
        towers.main(["--model-path", str(tiny_checkpoint("llama", tmp_path)), *SETTINGS])
    with pytest.raises(BadRequest, match="above 0"):
        towers.main(["--model-path", str(tmp_path), "--pictures", "0"])
