"""The perplexity benchmark: how it cuts its text, what it compares, and that it runs from end to end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from phloem.bench import accuracy
from phloem.core.errors import BadRequest, ModelLoadError
from phloem.testing.checkpoints import tiny_checkpoint


def test_windows_are_whole() -> None:
    assert accuracy.cut(list(range(10)), 9, 4) == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_refuses_senseless_sizes() -> None:
    with pytest.raises(BadRequest, match="window"):
        accuracy.main(["--window", "1"])
    with pytest.raises(BadRequest, match="tokens"):
        accuracy.main(["--tokens", "100", "--window", "512"])


def test_every_model_is_looked_at_before_any_is_measured(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="absent"):
        accuracy.main(["--models", "demo", str(tmp_path / "absent.gguf")])


def test_types_are_those_of_the_matrices() -> None:
    found = accuracy.weight_types("demo")
    assert list(found) == ["Q4_1", "Q8_0"]  # the norms, in F32, are no matrices
    assert found["Q8_0"] == 49152 * 576 // 32 * 34


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Settings of the runs, whose perplexities are those of a table that no engine computed."""
    made: list[dict[str, Any]] = []

    def scored(settings: dict[str, Any], options: accuracy.Options, name: str = "") -> dict[str, Any]:
        made.append(settings)
        kind = settings["kv_cache_dtype"].replace("auto", "bfloat16")
        value = {"bfloat16": 20.1, "int8": 20.5, "float32": 20.0}[kind]
        return {"perplexity": value, "tokens": 1, "seconds": 1.0, "kv_cache_dtype": kind}

    monkeypatch.setattr(accuracy, "perplexity", scored)
    return made


def test_each_kv_type_against_one_run_of_the_reference(
    runs: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = tiny_checkpoint("llama", tmp_path / "tiny")
    output = tmp_path / "accuracy.jsonl"
    flags = ["--models", "demo", str(tiny), "--kv-types", "auto", "int8", "--output", str(output)]
    assert accuracy.main([*flags, "--limit", "3"]) == 0
    kinds = [(run["model_path"], run.get("ops"), run["dtype"], run["kv_cache_dtype"]) for run in runs]
    for model, place in (("demo", 0), (str(tiny), 3)):
        assert kinds[place] == (model, "reference", "float32", "float32")
        assert [kind[1:] for kind in kinds[place + 1 : place + 3]] == [(None, "auto", "auto"), (None, "auto", "int8")]
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert [record["model"] for record in records] == ["demo", "demo", "tiny", "tiny"]  # no folders
    assert [round(record["difference_percent"], 6) for record in records] == [0.5, 2.5, 0.5, 2.5]
    assert [record["kv_cache_dtype"] for record in records] == ["bfloat16", "int8"] * 2  # what auto is
    assert records[0]["weights"]["Q4_1"] > 0 and records[2]["weights"] == {}
    text = capsys.readouterr().out
    assert "+0.500" in text and "+2.500" in text
    assert accuracy.main([*flags, "--limit", "2"]) == 1


def test_without_a_reference_nothing_is_compared(
    runs: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert accuracy.main(["--against", "none"]) == 0
    assert len(runs) == 1 and "20.1000" in capsys.readouterr().out


def test_methods_and_other_forms_against_the_dense_model(
    runs: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One run of the dense weights in the plain ops, whatever is compared with it; no limit unless one is asked for."""
    output = tmp_path / "accuracy.jsonl"
    assert accuracy.main(["--methods", "none", "int4", "--kv-types", "int8", "--output", str(output)]) == 0
    assert [(run.get("ops"), run["quantization"]) for run in runs] == [
        ("reference", None),
        (None, None),
        (None, "int4"),
    ]
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert [record["quantization"] for record in records] == [None, "int4"]
    assert [round(record["difference_percent"], 6) for record in records] == [2.5, 2.5]
    assert "demo, int4" in capsys.readouterr().out
    runs.clear()
    tiny = str(tiny_checkpoint("llama", tmp_path / "tiny"))
    flags = ["--models", "demo", tiny, "--dense", tiny, "--kv-types", "int8"]
    assert accuracy.main(flags) == 0
    assert [run["model_path"] for run in runs] == [tiny, "demo", tiny]
    assert accuracy.main([*flags, "--limit", "2"]) == 1


@pytest.mark.slow
def test_quantised_activations_cost_little(tmp_path: Path) -> None:
    output = tmp_path / "accuracy.jsonl"
    sizes = ["--tokens", "2048", "--window", "256", "--max-total-tokens", "8192", "--limit", "1.5"]
    assert accuracy.main([*sizes, "--output", str(output)]) == 0
    record = json.loads(output.read_text())
    assert record["served"]["tokens"] == record["plain"]["tokens"] == 8 * 255
    assert 5 < record["plain"]["perplexity"] < 60
