"""The simulated fleet: its times by hand, its accounts, its policies, and that a seed decides everything."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phloem.cli import main
from phloem.core.errors import ConfigError
from phloem.planning.layouts import Layout, stages
from phloem.planning.machines import MACHINES
from phloem.planning.steps import Costs, Efficiency, Work
from phloem.simulation.clockwork import Measured, Planned
from phloem.simulation.fleet import Fleet
from phloem.simulation.replica import Size
from phloem.simulation.seen import Gaps
from phloem.simulation.traces import BLOCK, MIXES, Conversation, Mix, conversations, read_trace

SMALL = Size(kv_tokens=20_000, page_size=16, max_running=16, context=4096, chunk=512)
# Five conversations a second, whose prompts grow, over eight system prompts.
TALK = Mix(8, 200, 1.0, (150, 0.5), (80, 0.5), (20, 0.5), turns=4.0, think=1.0)
PLAIN = Measured(step=0.001, weights=0.009, token=0.0001, row=0.0, read=0.0, pair=0.0)


def ran(policy: str, seconds: float = 8.0, replicas: int = 4, seed: int = 1, **more: Any) -> Fleet:
    fleet = Fleet(more.pop("size", SMALL), PLAIN, replicas, policy, seed, **more)
    fleet.run(conversations(TALK, 20.0, seconds, seed))
    return fleet


def talk(at: float, *turns: tuple[int, int, float], number: int = 0) -> Conversation:
    return Conversation(number, at, list(turns))


@pytest.mark.slow
def test_times_of_a_request_alone_are_those_of_its_steps() -> None:
    fleet = Fleet(SMALL, PLAIN, 1, "round_robin")
    seen = fleet.run([talk(2.0, (300, 5, 0.0))])
    first, later = 0.001 + 300 * 0.0001, 0.001 + 0.009
    assert seen.ttft == [pytest.approx(first)] and seen.e2e == [pytest.approx(first + 4 * later)]
    assert seen.gaps.count == 4 and seen.gaps.percentile(0.5) == pytest.approx(later, rel=0.01)
    assert seen.end == pytest.approx(2.0 + first + 4 * later)


@pytest.mark.slow
def test_a_long_prompt_is_computed_in_chunks() -> None:
    seen = Fleet(SMALL, PLAIN, 1, "round_robin").run([talk(0.0, (1200, 1, 0.0))])
    assert seen.ttft == [pytest.approx(3 * 0.001 + 1200 * 0.0001)]  # 512, 512, 176


@pytest.mark.slow
def test_the_next_turn_comes_after_the_pause_and_finds_what_was_said() -> None:
    seen = Fleet(SMALL, PLAIN, 1, "round_robin").run([talk(0.0, (256, 16, 1.5), (64, 1, 0.0))])
    told = seen.told()
    assert len(seen.ttft) == 2
    # 256 + 16 tokens were known, the last of them was never computed: 16 whole pages are found.
    assert told["hit_rate"] == pytest.approx(256 / (256 + 336), abs=1e-4)
    assert seen.ttft[1] == pytest.approx(0.001 + (336 - 256) * 0.0001, abs=2e-3)
    assert seen.end == pytest.approx(seen.e2e[0] + 1.5 + seen.e2e[1])


@pytest.mark.slow
def test_requests_of_one_replica_share_steps() -> None:
    alone = Fleet(SMALL, PLAIN, 1, "round_robin").run([talk(0.0, (50, 40, 0.0))])
    pair = Fleet(SMALL, PLAIN, 1, "round_robin").run([talk(0.0, (50, 40, 0.0), number=n) for n in range(8)])
    assert pair.output == 8 * alone.output and pair.end < 1.3 * alone.end


@pytest.mark.slow
def test_the_same_seed_gives_the_same_figures_and_another_one_others() -> None:
    once, again, other = (ran("cache_aware", 1.0, seed=seed).seen.told() for seed in (5, 5, 6))
    assert once == again and once != other


@pytest.mark.slow
def test_every_request_is_answered_and_every_page_comes_back() -> None:
    fleet = ran("power_of_two", size=replace(SMALL, kv_tokens=5000))
    seen = fleet.seen
    assert len(seen.ttft) == len(seen.e2e) == sum(seen.sent) == seen.asked_for > 50 and not seen.failed
    assert seen.gaps.count == seen.output - len(seen.e2e)
    assert all(not worker.running and worker.pending == worker.decoding == 0 for worker in fleet.workers)
    for replica in fleet.members:
        replica.scheduler.check()
        assert replica.scheduler.nothing_held and not replica.scheduler.live


@pytest.mark.slow
def test_little_memory_preempts_and_still_answers_all() -> None:
    size = replace(SMALL, kv_tokens=2048, context=1024)
    fleet = Fleet(size, PLAIN, 1, "round_robin")
    seen = fleet.run([talk(0.0, (200, 150, 0.0), number=n) for n in range(12)])
    assert len(seen.e2e) == 12 and seen.output == 12 * 150 and seen.told()["preemptions"] > 0
    fleet.members[0].scheduler.check()


@pytest.mark.slow
def test_a_policy_that_knows_of_caches_finds_more_and_answers_earlier() -> None:
    round_robin, aware, told = ran("round_robin", 3.0), ran("cache_aware", 3.0), ran("cache_aware", 3.0, events=True)
    rates = [fleet.seen.told()["hit_rate"] for fleet in (round_robin, aware, told)]
    ideal = aware.seen.told()["ideal_hit_rate"]
    assert rates[0] + 0.1 < rates[1] <= ideal and rates[0] + 0.1 < rates[2] <= ideal
    assert np.mean(aware.seen.ttft) < np.mean(round_robin.seen.ttft)
    assert max(round_robin.seen.sent) - min(round_robin.seen.sent) <= 1


@pytest.mark.slow
def test_replicas_that_refuse_early_answer_the_others_in_time() -> None:
    """Five times as many prompts as one replica computes: without a bound everybody waits ever longer."""

    def run(most: float) -> Any:
        talks = [talk(0.02 * n, (500, 4, 0.0), number=n) for n in range(250)]
        return Fleet(replace(SMALL, max_queue_seconds=most), PLAIN, 1, "round_robin").run(talks)

    seen = run(0.0), run(1.0)
    assert not seen[0].failed and seen[1].failed > 100 and len(seen[1].e2e) + seen[1].failed == 250
    assert max(seen[0].ttft) > 5.0 and max(seen[1].ttft) < 1.6
    assert seen[1].output / seen[1].end > 0.9 * seen[0].output / seen[0].end


@pytest.mark.slow
def test_a_cut_leaves_what_was_on_its_way() -> None:
    fleet = Fleet(SMALL, PLAIN, 2, "round_robin", 1)
    seen = fleet.run(conversations(TALK, 20.0, 8.0, 1), until=2.0)
    assert seen.end == 2.0 and seen.unfinished > 0
    assert seen.unfinished + len(seen.e2e) == seen.asked_for


def test_distributions_come_out_as_stated() -> None:
    found = list(conversations(MIXES["chat"], 400.0, 40.0, 3))
    turns = [len(item.turns) for item in found]
    later = [turn[0] for item in found for turn in item.turns[1:]]
    assert np.mean(turns) == pytest.approx(4.0, rel=0.05) and len(found) == pytest.approx(4_000, rel=0.05)
    assert np.mean([item.turns[0][0] for item in found]) == pytest.approx(400, rel=0.05)
    assert np.mean(later) == pytest.approx(120, rel=0.05)
    gaps = np.diff([item.start for item in found])
    assert gaps.std() / gaps.mean() == pytest.approx(1.0, abs=0.05)
    bursty = np.diff([item.start for item in conversations(replace(MIXES["chat"], burst=3.0), 400.0, 40.0, 3)])
    assert bursty.std() / bursty.mean() == pytest.approx(3.0, rel=0.15)


@pytest.mark.slow
def test_a_trace_file_is_played_and_its_shared_blocks_are_found(tmp_path: Path) -> None:
    lines = [
        {"timestamp": 3000 * n, "input_length": 2 * BLOCK + 100, "output_length": 4, "hash_ids": [1, 2, 10 + n]}
        for n in range(3)
    ]
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines))
    found = read_trace(path, speed=3.0)
    assert [item.start for item in found] == [0.0, 1.0, 2.0]
    seen = Fleet(SMALL, PLAIN, 1, "round_robin").run(found)
    assert seen.told()["hit_rate"] == pytest.approx(2 * 2 * BLOCK / (3 * (2 * BLOCK + 100)), abs=1e-4)
    path.write_text('{"timestamp": 0, "input_length": 900, "output_length": 4, "hash_ids": [1]}')
    with pytest.raises(ConfigError, match="line 1: 900 tokens in 1 blocks"):
        read_trace(path)
    path.write_text("{}")
    with pytest.raises(ConfigError, match="line 1: KeyError: 'hash_ids'"):
        read_trace(path)


def test_step_times_are_measured_or_those_of_a_plan(tmp_path: Path) -> None:
    path = tmp_path / "steps.json"
    path.write_text('{"step": 0.002, "weights": 0.0, "token": 1e-5, "row": 1e-4, "read": 1e-6, "pair": 1e-8}')
    assert Measured.load(path)(100, 4, 4, 1000, 500, 0) == pytest.approx(0.002 + 1e-3 + 4e-4 + 1e-3 + 5e-6)
    for text, said in (('{"steps": 1}', "steps = 1"), ("[]", "expected an object"), ('{"row": -1}', "row = -1")):
        path.write_text(text)
        with pytest.raises(ConfigError, match=said):
            Measured.load(path)


def test_a_plans_formulae_time_mixed_steps(tmp_path: Path) -> None:
    from phloem.planning.shape import read_shape

    config = {"model_type": "llama", "vocab_size": 1000, "hidden_size": 512, "intermediate_size": 1024,
              "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4,
              "max_position_embeddings": 4096, "torch_dtype": "bfloat16"}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    shape = read_shape(str(tmp_path))
    costs = Costs(shape, Layout(tp=2), stages(shape, 1), MACHINES["h100"], Efficiency())
    planned = Planned(costs)
    assert planned(8, 8, 8, 8000, 0, 0) == costs.seconds(Work.decode(8, 1000))
    assert planned(2000, 2, 0, 0, 2000 * 500, 1000) == costs.seconds(Work.prefill(2000, 500, 2))
    assert planned(2008, 10, 8, 8000, 2000 * 500, 1000) > planned(2000, 2, 0, 0, 2000 * 500, 1000)


def test_percentiles_of_a_histogram_are_those_of_its_values() -> None:
    gaps, values = Gaps(), np.random.default_rng(1).lognormal(-5, 1, 5000)
    for value in values:
        gaps.add(float(value))
    for share in (0.1, 0.5, 0.99):
        assert gaps.percentile(share) == pytest.approx(float(np.percentile(values, share * 100)), rel=0.02)
    assert np.isnan(Gaps().percentile(0.5))


@pytest.mark.slow
def test_the_command_prints_policies_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["bench", "simulate", "--replicas", "2", "--seconds", "1", "--rate", "3", "--max-running-requests", "16"]
    output = tmp_path / "runs.jsonl"
    assert main([*args, "--policies", "random,cache_aware", "--output", str(output)]) == 0
    text = capsys.readouterr().out
    assert "random" in text and "TTFT p99, ms" in text and "running, fullest over mean" in text
    record = json.loads(output.read_text())
    assert set(record["policies"]) == {"random", "cache_aware"}
    for run in record["policies"].values():
        assert run["requests"] > 0 and run["ttft_ms"]["p50"] <= run["ttft_ms"]["p99"] <= run["e2e_ms"]["p99"]
        assert 0 <= run["hit_rate"] <= run["ideal_hit_rate"] and run["load"]["busy_mean"] <= run["load"]["busy_max"]


def test_the_command_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for args, said in (
        (["--policies", "fastest"], "fastest"),
        (["--replicas", "0"], "replicas must be above 0"),
        (["--workload", "none"], "workload 'none' is none of throughput, chat"),
        (["--kv-tokens", "1000"], "hold no request of the context"),
        (["--steps", "a", "--model", "b"], "give one of the two"),
        (["--trace", str(tmp_path / "gone")], "gone"),
        (["--turns", "0.5"], "turns must be at least 1"),
        (["--rate", "nan"], "rate: nan is no number"),
        (["--think", "inf"], "think: inf is no number"),
        (["--output", str(tmp_path / "gone" / "a.jsonl")], "its folder is not there"),
    ):
        assert main(["bench", "simulate", *args]) == 1
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1, error


@pytest.mark.slow
def test_the_plot_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    args = ["bench", "simulate", "--replicas", "2", "--seconds", "1", "--plot", str(tmp_path / "a.png"), "--json"]
    assert main(args) == 0 and (tmp_path / "a.png").stat().st_size > 5000
