"""For scripts/gpu_check.py: the kernels that may multiply many rows of experts, and early launches, each beside what it
stands in for."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Iterator
from typing import Any

import torch
from gpu_bench import timed

from phloem.kernels import reference_formats as formats
from phloem.kernels.triton import early, moe, trial

EACH = (96, 192, 384, 768)  # rows an expert


def work_of(config: dict[str, Any], device: torch.device, dtype: torch.dtype, float8: torch.dtype | None) -> trial.Work:
    """The experts of one layer, of random weights; with `float8` in blocks of that."""
    count, features, between = config["num_experts"], config["hidden_size"], config["moe_intermediate_size"]

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device).mul_(shape[-1] ** -0.5).to(dtype)

    gate_up, down = drawn(count, 2 * between, features), drawn(count, features, between)
    if float8 is None:
        return trial.Work(gate_up, down, 0, None, moe.parts_of_tiles)
    (first, second), (third, fourth) = (formats.quantise_blocks(one.float(), float8) for one in (gate_up, down))
    return trial.Work(first, third, 0, (second, fourth), moe.parts_of_tiles)


def bench_experts(
    config: dict[str, Any], device: torch.device, dtype: torch.dtype, float8: torch.dtype | None, seconds: float
) -> list[dict[str, Any]]:
    """For each number of rows an expert: milliseconds and TFLOP/s of each kernel, or why it has none."""
    choices, rows = config["num_experts_per_tok"], []
    tiny = device.type == "cpu"
    with torch.inference_mode():
        work = work_of(config, device, dtype, float8)
        x = torch.empty((1, config["hidden_size"]), dtype=dtype, device=device)
        for each in (66,) if tiny else EACH:
            runs = trial.runs_of(work, x, choices, each)
            count = runs[trial.STANDARD]().shape[0]
            flops = 6 * count * config["hidden_size"] * config["moe_intermediate_size"]
            row: dict[str, Any] = {"pairs": count, "each": count / config["num_experts"], "kernels": {}}
            for name, run in runs.items():
                try:
                    best = statistics.median(timed(device, run, 5, seconds))
                    row["kernels"][name] = {"ms": best * 1e3, "tflops": flops / best / 1e12}
                except Exception as error:  # of whatever kind: a kernel that this device does not take
                    row["kernels"][name] = {"refused": f"{type(error).__name__}: {error}"[:200]}
            rows.append(row)
    return rows


def lines(found: dict[str, list[dict[str, Any]]]) -> list[str]:
    """The table of what was found, by type of weights."""
    out = ["| weights | rows an expert | kernel | ms | TFLOP/s |", "| --- | ---: | --- | ---: | ---: |"]
    for kind, rows in found.items():
        for row in rows:
            for name, one in row["kernels"].items():
                numbers = one.get("refused") or f"{one['ms']:.3f} | {one['tflops']:.0f}"
                out.append(f"| {kind} | {row['each']:.0f} | {name} | {numbers} |")
    return out


@contextlib.contextmanager
def late() -> Iterator[None]:
    """Kernels are launched when the one ahead of them has ended."""
    before = early._on
    early._on = lambda name: False  # type: ignore[assignment]
    try:
        yield
    finally:
        early._on = before
