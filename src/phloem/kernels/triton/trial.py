"""Which kernel multiplies the rows of experts where they are many: found by a short trial on the device.

The trial is made at the first step that has so many rows and is not being recorded; the dummy steps before an engine is
ready have them. It takes the model's own weights and random rows, first compares each form of `many.py` with the kernel
that walks one tile a program, and then takes the time of those that agree with it. Where there is no such device, or
the environment's `PHLOEM_MOE_TRIAL` is off, nothing is tried. On tensors without data every form is launched, so that
all are compiled beside the loading.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from phloem.kernels import chosen
from phloem.kernels.chosen import switched_on
from phloem.kernels.triton import many
from phloem.kernels.triton._base import ceil_div
from phloem.kernels.triton._device import capability
from phloem.kernels.triton.quantise import per_group_fp8, per_token_fp8
from phloem.kernels.triton.route import sort_by_expert
from phloem.utils import log

_log = log.get("kernels.triton")

CAPABLE = 90  # compute capability from which on descriptors are read by the hardware
EACH = (96, 384)  # rows an expert
MOST_BYTES = 256 << 20  # of the results of a trial
BETTER = 0.97  # of the standard kernel's time, from which on another one is taken
WRONG = 0.02  # relative norm of the difference
TIMES = 5
STANDARD = "a tile a program"
SETTING = "PHLOEM_MOE_TRIAL"

Pair = tuple[Tensor, Tensor]
Run = Callable[[], Tensor]
Clock = Callable[[Run], float]


class Tiles(Protocol):
    """The standard kernel: x, weights, gate_up, down, kind, scales, lists, tile -> the part of each pair."""

    def __call__(
        self, x: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, kind: int, scales: Pair | None, lists: Pair,
        tile: int, /,
    ) -> Tensor: ...  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class Work:
    """The product of experts, but for its rows."""

    gate_up: Tensor
    down: Tensor
    kind: int
    scales: Pair | None
    tiles: Tiles

    @property
    def forms(self) -> tuple[many.Form, ...]:
        return many.FORMS if self.scales is None else many.FORMS_FLOAT8

    def standard(self, x: Tensor, weights: Tensor, lists: Pair) -> Tensor:
        return self.tiles(x, weights, self.gate_up, self.down, self.kind, self.scales, lists, many.TILE)

    def form(self, form: many.Form, x: Tensor, weights: Tensor, lists: Pair) -> Tensor:
        quantise = per_token_fp8 if self.scales is not None and self.scales[0].dim() == 2 else per_group_fp8
        return many.parts_of_many(x, weights, self.gate_up, self.down, self.kind, self.scales, lists, form, quantise)

    def key(self, x: Tensor, choices: int) -> tuple[object, ...]:
        dims = None if self.scales is None else self.scales[0].dim()
        return x.device, x.dtype, self.gate_up.dtype, tuple(self.down.shape), choices, self.kind, dims

    def name(self, dtype: torch.dtype, choices: int) -> str:
        count, features, between = self.down.shape
        kind = str(self.down.dtype).removeprefix("torch.")
        return f"experts: {choices} of {count}, {features} x {between}, {kind} ({str(dtype).removeprefix('torch.')})"


Tried = tuple[tuple[int, many.Form | None], ...]
FOUND: dict[tuple[object, ...], Tried] = {}


def form_for(work: Work, x_TN: Tensor, weights_Tk: Tensor, lists: Pair) -> many.Form | None:
    """The form to multiply these rows with; None: by the standard kernel."""
    if capability(x_TN.device) < CAPABLE:
        return None
    tokens, choices = weights_Tk.shape
    if x_TN.device.type == "meta":
        if not many.unfit(work.gate_up, work.down, work.scales) and switched_on(SETTING):
            for form in work.forms:
                work.form(form, x_TN, weights_Tk, lists)
        return None
    key = work.key(x_TN, choices)
    if key not in FOUND:
        if torch.cuda.is_current_stream_capturing():
            return None
        FOUND[key] = tried(work, x_TN, choices, on_device)
    return at_rows(FOUND[key], tokens * choices // work.down.shape[0])


def at_rows(found: Tried, each: int) -> many.Form | None:
    """What was found for the largest number of rows an expert that is not above this one."""
    return next((form for rows, form in reversed(found) if rows <= each), found[0][1])


def tried(work: Work, x_TN: Tensor, choices: int, clock: Clock) -> Tried:
    """Rows an expert, and the form that was best for them; told in the log. Failures leave the standard kernel."""
    name = work.name(x_TN.dtype, choices)
    why = many.unfit(work.gate_up, work.down, work.scales)
    if not why and not switched_on(SETTING):
        why = f"{SETTING} is off"
    if why:
        _tell(name, STANDARD, why)
        return ((0, None),)
    found: list[tuple[int, many.Form | None]] = []
    for each in EACH:
        try:
            best, reason = race(runs_of(work, x_TN, choices, each), clock)
        except Exception as error:  # of whatever kind: out of memory, most likely; the engine goes on without
            best, reason = STANDARD, f"no trial: {_line(error)}"
        _tell(f"{name}, {each} rows each", best, reason)
        found.append((each, next((form for form in work.forms if form.name == best), None)))
    return tuple(found)


def runs_of(work: Work, x_TN: Tensor, choices: int, each: int) -> dict[str, Run]:
    """The standard kernel and all forms over random rows, about so many an expert, in the type of x."""
    count, features = work.down.shape[0], x_TN.shape[1]
    most = MOST_BYTES // (features * x_TN.element_size())
    tokens = max(1, min(ceil_div(each * count, choices), most // choices))
    generator = torch.Generator(x_TN.device).manual_seed(1)
    x = torch.randn((tokens, features), generator=generator, device=x_TN.device).to(x_TN.dtype)
    ids = torch.randint(count, (tokens, choices), generator=generator, device=x_TN.device).int()
    weights = torch.rand((tokens, choices), generator=generator, device=x_TN.device)
    lists = sort_by_expert(ids, count, many.TILE)
    runs: dict[str, Run] = {STANDARD: partial(work.standard, x, weights, lists)}
    return runs | {form.name: partial(work.form, form, x, weights, lists) for form in work.forms}


def race(runs: dict[str, Run], clock: Clock) -> tuple[str, str]:
    """(The best, why) of runs whose first gives what all have to give. Ones that fail or differ are left out."""
    standard = next(iter(runs))
    want = runs[standard]().float()
    size = float(want.norm())
    seconds, out = {standard: clock(runs[standard])}, dict[str, str]()
    for name, run in runs.items():
        if name == standard:
            continue
        try:
            off = float((run().float() - want).norm())
            if not off <= WRONG * size:
                out[name] = f"is off by {off:.2g} of {size:.2g}"
                continue
            seconds[name] = clock(run)
        except Exception as error:  # of whatever kind: the form is tried in order to learn whether it works
            out[name] = f"fails: {_line(error)}"
    best = min(seconds, key=seconds.__getitem__)
    if seconds[best] > BETTER * seconds[standard]:
        best = standard
    parts = [f"{name} {1e6 * one:.0f} us" for name, one in seconds.items()] + [
        f"{name} {why}" for name, why in out.items()
    ]
    return best, "; ".join(parts)


def on_device(run: Run) -> float:
    """Seconds of a run on the GPU: the median of a few, after one more."""
    run()
    times: list[float] = []
    for _ in range(TIMES):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times)


def _tell(name: str, which: str, why: str) -> None:
    chosen.note(name, which, why)
    _log.info("%s: %s (%s)", name, which, why)


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
