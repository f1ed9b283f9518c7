"""Where each routed expert of a sparse layer is computed: a table `expert -> place`, made by a strategy or by counts.

A place is the device that the model runs on, or the host beside it. Strategies have the names that SGLang's
`--kt-expert-placement-strategy` has. Everything here is arithmetic over tables; `layers/placed.py` keeps to them.

Legend: L sparse layers, E experts of a layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from phloem.core.errors import ConfigError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Counts = NDArray[np.int64]  # [L, E]: tokens that chose the expert
    Table = NDArray[np.bool_]  # [L, E]: whether the expert is on the device

Strategy = Literal["uniform", "frequency", "front-loading", "random"]

SEED = 42  # of `random`
KEYS = ("counts", "logical_count")  # of a file of counts, ours and SGLang's
MOST = 2**53  # of a count: whole numbers beyond it are not told apart
WORTH = 1.1  # an expert moves to the device when it is chosen so many times as often as the one that it takes over from


@dataclass(frozen=True, slots=True)
class Move:
    """In one layer: `comes` takes the place that `goes` had on the device."""

    layer: int
    comes: int
    goes: int


def place(strategy: Strategy, layers: int, experts: int, each: int, counts: Counts | None = None) -> Table:
    """Which experts are on the device, `each` a layer on average.

    uniform: the first of every layer. front-loading: all of the first layers, until the places are used up. random:
    anywhere, the same ones at every start. frequency: those that are chosen most often in their layer, by `counts`.

    Raises:
        ConfigError: more than there are, or `frequency` without counts of this model.
    """
    if not 0 <= each <= experts:
        raise ConfigError(f"kt_num_gpu_experts: {each} of {experts} experts", param="kt_num_gpu_experts")
    table = np.zeros((layers, experts), dtype=np.bool_)
    if strategy == "uniform":
        table[:, :each] = True
    elif strategy == "front-loading":
        table.reshape(-1)[: each * layers] = True
    elif strategy == "random":
        table.reshape(-1)[np.random.default_rng(SEED).permutation(table.size)[: each * layers]] = True
    else:
        if counts is None or counts.shape != table.shape:
            seen = "none are given" if counts is None else f"those given are {list(counts.shape)}"
            raise ConfigError(
                f"kt_expert_placement_strategy frequency: it needs counts of {layers} layers and {experts} experts "
                f"(--init-expert-location); {seen}",
                param="init_expert_location",
            )
        best = np.argsort(-counts, axis=1, kind="stable")[:, :each]
        np.put_along_axis(table, best, True, axis=1)
    return table


def moves(table: Table, counts: Counts, most: int) -> list[Move]:
    """At most `most` exchanges that serve more tokens on the device, the most worthwhile first."""
    found: list[tuple[int, Move]] = []
    for layer in range(len(table)):
        inside, outside = np.flatnonzero(table[layer]), np.flatnonzero(~table[layer])
        cold = inside[np.argsort(counts[layer][inside], kind="stable")]
        hot = outside[np.argsort(-counts[layer][outside], kind="stable")]
        for comes, goes in zip(hot.tolist(), cold.tolist(), strict=False):
            gain = int(counts[layer, comes] - counts[layer, goes])
            if gain <= 0 or counts[layer, comes] < WORTH * counts[layer, goes]:
                break
            found.append((gain, Move(layer, comes, goes)))
    found.sort(key=lambda item: -item[0])
    return [move for _, move in found[:most]]


def hit_share(table: Table, counts: Counts) -> float:
    """Of all choices, the part whose expert is on the device; 0 where nothing has been counted."""
    total = int(counts.sum())
    return float(counts[table].sum()) / total if total else 0.0


def counts_of(data: Any, where: str) -> Counts:
    """Counts from what a file holds: a list of lists, or a mapping with it under `counts` or `logical_count`. A first
    axis of several steps is summed.

    Raises:
        ConfigError: it is something else.
    """
    found = data
    if isinstance(data, dict):
        found = next((data[key] for key in KEYS if key in data), None)
    try:
        counts = np.asarray(found, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        counts = np.zeros(0)
    counts = counts.sum(0) if counts.ndim == 3 else counts
    if counts.ndim != 2 or not counts.size or not ((counts >= 0) & (counts <= MOST)).all():
        raise ConfigError(f"{where}: no table of counts, a row for each layer", param="init_expert_location")
    return counts.astype(np.int64)
