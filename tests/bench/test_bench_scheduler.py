"""The scheduler benchmark measures what it says, on a small scale."""

from __future__ import annotations

import json

import pytest

from phloem.bench import scheduler


@pytest.mark.slow
def test_prints_a_line_per_measurement(capsys: pytest.CaptureFixture[str]) -> None:
    assert scheduler.main(["--sizes", "10", "200", "--steps", "20", "--running", "8", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 2 * 8 and {row["size"] for row in rows} == {10, 200}
    assert all(0 < row["p50_us"] <= row["p99_us"] for row in rows)


@pytest.mark.slow
def test_a_step_with_a_long_queue_stays_under_a_millisecond() -> None:
    for policy in ("fcfs", "lpm", "priority"):
        row = scheduler.bench_steps(10_000, policy, running=32, turnover=True, steps=60)
        # 1 ms is the aim; a machine that is busy with other work gets some slack.
        assert row["p50_us"] < 3000, row
