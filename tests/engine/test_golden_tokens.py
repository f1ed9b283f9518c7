"""What the engine says is what it said when tests/data/golden_tokens.json was recorded (scripts/golden_tokens.py)."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import golden_record
import golden_tokens
import pytest

GOLDEN = Path(__file__).parents[1] / "data" / "golden_tokens.json"
QUICK = ("/ reference float32, few pages /",)


@pytest.fixture(scope="module")
def recording() -> dict[str, Any]:
    return json.loads(GOLDEN.read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("golden")


def check(recording: dict[str, Any], got: dict[str, Any]) -> None:
    found, count, remarks = golden_record.compare_all(recording, got)
    assert not found, "\n".join(found[:20])
    if not count:
        pytest.skip("; ".join(remarks) or "the model is not installed")


@pytest.mark.slow
def test_a_tiny_model_says_what_it_said_with_few_pages(recording: dict[str, Any], folder: Path) -> None:
    """Chunks, shared prefixes, preemption, draws; with the overlapped schedule and without."""
    got = golden_tokens.collect(folder, models=["tiny-llama"], ops="reference", only=QUICK)
    assert {len(cases) for cases in got["reference"].values()} == {1}
    check(recording, got)


@pytest.mark.some(5)
@pytest.mark.slow
@pytest.mark.parametrize("model", golden_tokens.MODELS)
def test_a_model_says_what_it_said(recording: dict[str, Any], folder: Path, model: str) -> None:
    check(recording, golden_tokens.collect(folder, models=[model]))


def test_every_case_that_is_run_was_recorded(recording: dict[str, Any]) -> None:
    for kind, known in (("reference", recording["portable"]), *(("native", c) for c in recording["levels"].values())):
        wanted = {plan.case(ask) for plan in golden_tokens.plans() if plan.ops == kind for ask in plan.asks}
        assert wanted == {name.split(" @ ")[0] for name in known}


def test_a_changed_token_is_found_and_a_rounding_is_not(recording: dict[str, Any]) -> None:
    name = "tiny-llama / reference float32 / logprobs"
    case = recording["portable"][name]
    assert golden_record.differences(case, case) == []
    token, value, shorter, missing = (copy.deepcopy(case) for _ in range(4))
    token[1]["ids"][3] += 1
    assert [line.split(":")[0] for line in golden_record.differences(case, token)] == ["[1].ids[3]"]
    value[0]["output_token_logprobs"][2] += 0.001
    assert golden_record.differences(case, value) == []
    value[0]["output_token_logprobs"][2] += 0.01
    assert len(golden_record.differences(case, value)) == 1
    shorter[2]["ids"].pop()
    assert golden_record.differences(case, shorter) == ["[2].ids: 16 entries became 15"]
    del missing[0]["finish"]
    assert golden_record.differences(case, missing) == ["[0].finish: only in one of them"]


def test_a_case_that_says_something_else_without_overlap_is_kept_twice() -> None:
    modes = {"overlap": {"a": [1, 2], "b": [3]}, "plain": {"a": [1, 2], "b": [4]}}
    kept = golden_record.merged(modes)
    assert kept == {"a": [1, 2], "b": [3], "b @ plain": [4]}
    assert golden_record.compare(kept, modes) == ([], 4)
    found, count = golden_record.compare(kept, {"plain": {"a": [1, 3], "b": [3], "c": []}})
    assert count == 2 and [line.split(":")[0] for line in found] == ["a @ plain", "b @ plain", "c @ plain"]


def test_recording_a_part_leaves_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "recording.json"
    golden_record.record(path, {"reference": {"overlap": {"a": [1], "b": [2]}}, "native": {"overlap": {"n": 1}}})
    golden_record.record(path, {"reference": {"overlap": {"b": [3]}}, "native": {"overlap": {}}})
    kept = json.loads(path.read_text())
    assert kept["portable"] == {"a": [1], "b": [3]} and kept["levels"] == {golden_record.level(): {"n": 1}}
    other = {**kept, "levels": {"another": {"n": 2}}}
    found = golden_record.compare_all(other, {"reference": {}, "native": {"overlap": {"n": 1}}})
    assert found[:2] == ([], 0) and "were not compared" in found[2][0]
