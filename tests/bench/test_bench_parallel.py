"""`bench parallel`: what meetings of ranks take of a step."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from share_support import checkpoint

from phloem.bench import parallel
from phloem.core.errors import BadRequest
from phloem.distributed.groups import Groups


def test_every_call_of_every_group_is_counted() -> None:
    times = parallel.Times()
    (groups,) = [parallel.timed(groups, times) for groups in Groups.threads(1, 2)[:1]]
    assert groups.tp is not None and groups.before is None and groups.rank == 0
    groups.abort()
    with pytest.raises(Exception, match="gone"):
        groups.tp.all_reduce(torch.zeros(4))
    assert not times.calls, "a call that fails took no time of a step"
    assert times.of("x", 8, lambda: 3) == 3 and times.calls["x"] == 1 and times.bytes["x"] == 8


def test_one_rank_has_nothing_to_measure() -> None:
    with pytest.raises(BadRequest, match="several ranks"):
        parallel.main(["demo"])


@pytest.mark.slow
def test_a_tiny_model_on_two_ranks(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path, output = checkpoint("llama", tmp_path), tmp_path / "out.jsonl"
    options = ["--dtype", "float32", "--ops", "reference", "--context", "32", "--steps", "4", "--output", str(output)]
    assert parallel.main([str(path), "--tp-size", "2", *options]) == 0
    record = json.loads(output.read_text())
    assert record == json.loads(capfd.readouterr().out.splitlines()[-1])
    assert record["one_rank_ms"] > 0 and record["ranks_ms"] > 0 and record["tp_size"] == 2
    assert 0 < record["meetings_share"] < 1
    kinds = ["steady", "page", "new"]
    assert set(record["told_us"]) == {"launched", *kinds, *(f"{kind}_encoded" for kind in kinds)}
    assert all(value > 0 for value in record["told_us"].values())
    sums = next(one for one in record["meetings"] if one["what"] == "tp all_reduce")
    assert sums["calls"] == 7 and sums["us"] > 0, "two of each of three layers, and the embedding"
    first, second = record["bytes_read"]
    whole = (path / "model.safetensors").stat().st_size
    assert abs(first - second) < 0.1 * first and 0.48 * whole < first < 0.6 * whole


@pytest.mark.slow
def test_stages_of_a_pipeline_are_told_how_busy_they_are(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = checkpoint("llama", tmp_path)
    options = ["--dtype", "float32", "--ops", "reference", "--context", "32", "--steps", "4", "--batch", "4"]
    assert parallel.main([str(path), "--pp-size", "2", *options]) == 0
    record = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert record["waves"] == 2 and [one["batches"] for one in record["stages"]] == [1, 2, 4]
    for one in record["stages"]:
        assert one["step_ms"] > 0 and len(one["busy"]) == 2 and all(0 < share < 1 for share in one["busy"])
