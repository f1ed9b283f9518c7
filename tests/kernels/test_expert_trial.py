"""Which kernel multiplies many rows of experts: the trial's rules, with pretended clocks and products."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from phloem.core.errors import ConfigError
from phloem.engine.warmup import warm
from phloem.kernels import chosen
from phloem.kernels.triton import _device, early, many, trial

ONE = torch.ones(4, 8)


def never(*_: Any) -> Tensor:
    raise AssertionError("run")


def work_of(count: int = 8, features: int = 64, between: int = 32, **how: Any) -> trial.Work:
    gate_up, down = torch.zeros(count, 2 * between, features), torch.zeros(count, features, between)
    return trial.Work(how.pop("gate_up", gate_up), how.pop("down", down), 0, how.pop("scales", None), never)


def clock(times: dict[str, float], runs: dict[str, trial.Run]) -> trial.Clock:
    names = {id(run): name for name, run in runs.items()}
    return lambda run: times[names[id(run)]]


@pytest.mark.parametrize(
    ("fast", "best"),
    [(0.5, "other"), (0.96, "other"), (0.98, "first"), (1.0, "first"), (2.0, "first")],
)
def test_another_kernel_has_to_be_faster_by_more_than_noise(fast: float, best: str) -> None:
    runs: dict[str, trial.Run] = {"first": lambda: ONE, "other": lambda: ONE + 1e-4}
    found, why = trial.race(runs, clock({"first": 1.0, "other": fast}, runs))
    assert found == best and "first 1000000 us; other" in why


@pytest.mark.parametrize(
    ("given", "why"),
    [(ONE * 1.1, "other is off by"), (ONE * float("nan"), "other is off by nan"), (None, "other fails: no such tile")],
)
def test_what_is_wrong_or_fails_is_not_timed_and_never_taken(given: Tensor | None, why: str) -> None:
    def other() -> Tensor:
        if given is None:
            raise RuntimeError("no such tile\nand more")
        return given

    runs: dict[str, trial.Run] = {"first": lambda: ONE, "other": other}
    found, reason = trial.race(runs, clock({"first": 1.0}, runs))
    assert found == "first" and why in reason


def test_weights_of_zeros_are_tried_too() -> None:
    runs: dict[str, trial.Run] = {"first": lambda: ONE * 0, "other": lambda: ONE * 0}
    assert trial.race(runs, clock({"first": 1.0, "other": 0.1}, runs))[0] == "other"


def test_the_choice_follows_the_rows_an_expert() -> None:
    low, high = many.FORMS[:2]
    found = (96, low), (384, high)
    assert [trial.at_rows(found, each) for each in (65, 96, 383, 384, 5000)] == [low, low, low, high, high]
    assert trial.at_rows(((0, None),), 5000) is None


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ({"between": 12}, None),
        ({"between": 10}, "rows of 10 features do not begin at multiples of 16 bytes"),
        ({"down": torch.zeros(8, 128, 32)[:, ::2]}, None),
        ({"down": torch.zeros(8, 65, 32)[:, :64]}, "experts do not lie one behind the other"),
        ({"scales": (torch.ones(8, 1, 1), torch.ones(8, 1, 1))}, "32 features between the products are no multiple"),
        ({"scales": (torch.ones(8, 64), torch.ones(8, 64))}, None),
    ],
)
def test_weights_that_descriptors_do_not_reach_are_left_to_the_standard_kernel(how: Any, why: str | None) -> None:
    work = work_of(**how)
    found = many.unfit(work.gate_up, work.down, work.scales)
    assert found == "" if why is None else why in found
    if why is not None:
        assert trial.tried(work, torch.zeros(1, 64), 2, lambda run: 1.0) == ((0, None),)
        name = work.name(torch.float32, 2)
        assert chosen.told()[name] == {"kernel": trial.STANDARD, "why": found}


def test_a_trial_that_cannot_be_made_leaves_the_standard_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("out of memory. Tried\nmore")

    monkeypatch.setattr(trial, "runs_of", full)
    work = work_of(between=24)
    assert trial.tried(work, torch.zeros(1, 64), 2, lambda run: 1.0) == ((96, None), (384, None))
    told = chosen.told()[f"{work.name(torch.float32, 2)}, 96 rows each"]
    assert told == {"kernel": trial.STANDARD, "why": "no trial: out of memory. Tried"}


def test_a_trial_is_made_once_and_never_while_a_step_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "FOUND", {})
    monkeypatch.setattr(trial, "capability", lambda device: 90)
    made: list[int] = []

    def tried(work: trial.Work, x: Tensor, choices: int, clock: trial.Clock) -> trial.Tried:
        made.append(choices)
        return ((96, many.FORMS[0]),)

    monkeypatch.setattr(trial, "tried", tried)
    recording = [True]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: recording[0])
    work, lists = work_of(), (ONE, ONE)
    x, weights = torch.zeros(400, 64), torch.zeros(400, 2)
    assert trial.form_for(work, x, weights, lists) is None and not made
    recording[0] = False
    assert trial.form_for(work, x, weights, lists) == many.FORMS[0] and made == [2]
    recording[0] = True
    assert trial.form_for(work, x, weights, lists) == many.FORMS[0] and made == [2]
    monkeypatch.setattr(trial, "capability", lambda device: 80)
    assert trial.form_for(work, x, weights, lists) is None


def test_the_switch_leaves_the_trial_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PHLOEM_MOE_TRIAL", "off")
    assert trial.tried(work_of(), torch.zeros(1, 64), 2, lambda run: 1.0) == ((0, None),)
    told = chosen.told()[work_of().name(torch.float32, 2)]
    assert told == {"kernel": trial.STANDARD, "why": "PHLOEM_MOE_TRIAL is off"}


def test_early_launches_need_the_device_and_the_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(early, "_on", chosen.switched_on)
    meta, plain = torch.empty(2, device="meta"), {"PDL": False}
    assert early.early(torch.zeros(2)) == plain
    for capability, found in ((0, plain), (80, plain), (90, {"PDL": True, "launch_pdl": True})):
        monkeypatch.setattr(_device.AHEAD, "capability", capability)
        assert early.early(meta) == found
    monkeypatch.setenv("PHLOEM_PDL", "0")
    assert early.early(meta) == plain
    monkeypatch.setenv("PHLOEM_PDL", "2")
    with pytest.raises(ConfigError, match="PHLOEM_PDL: '2' is not one of on, 1, off, 0"):
        early.early(meta)


def test_server_info_says_what_was_chosen(tmp_path: Any) -> None:
    from types import SimpleNamespace

    chosen.note("some work", "one kernel", "it is faster")
    compiled: Any = SimpleNamespace(tally=SimpleNamespace(facts=dict), directory=tmp_path)
    assert warm.Warming(compiled, None, "").told()["chosen"]["some work"] == {
        "kernel": "one kernel",
        "why": "it is faster",
    }
