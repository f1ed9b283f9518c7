"""All layouts of a model over so many devices, priced for a workload, the best first."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from phloem.core.errors import ConfigError
from phloem.planning.layouts import Layout, Memory, Stage, layouts, memory, refusal, stages
from phloem.planning.machines import GIB
from phloem.planning.steps import Costs, Efficiency, Terms, Work

if TYPE_CHECKING:
    from phloem.planning.machines import Machine
    from phloem.planning.shape import Shape

MOST_ROWS = 2048  # of a rank of attention: beyond, nothing is gained and every latency suffers


@dataclass(frozen=True)
class Load:
    """What is asked of the devices. Lengths in tokens; `hit`: the share of prompts that is cached.

    `batch`: requests that run at a time on all devices together; 0: as many as fit. `itl`: seconds a token may take;
    0: any. `chunk`: prompt tokens of one step of a rank of attention.
    """

    prompt: int = 2048
    output: int = 256
    context: int = 0
    batch: int = 0
    hit: float = 0.0
    itl: float = 0.0
    chunk: int = 8192
    redundant: int = 0
    fraction: float = 0.92

    @property
    def longest(self) -> int:
        return self.context or self.prompt + self.output

    def checked(self) -> Load:
        """Itself. Raises ConfigError, naming the field."""
        for name in ("prompt", "output", "chunk"):
            if not getattr(self, name) >= 1:
                raise ConfigError(f"{name}: {getattr(self, name)} must be above 0", param=name)
        for name in ("context", "batch", "redundant", "itl"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"{name}: {getattr(self, name)} is not a number from 0 on", param=name)
        if not 0 <= self.hit < 1:
            raise ConfigError(f"hit: {self.hit:g} must be in [0, 1)", param="hit")
        if not 0 < self.fraction <= 1:
            raise ConfigError(f"fraction: {self.fraction:g} must be in (0, 1]", param="fraction")
        if self.longest < self.prompt + self.output:
            raise ConfigError(f"context {self.context} is less than prompt + output", param="context")
        return self


@dataclass
class Price:
    """One layout and what it gives. Rates are of all devices; `rows`: of one rank of attention."""

    layout: Layout
    memory: Memory
    rows: int
    itl: float  # seconds of a token
    ttft: float  # seconds of a prompt alone
    decode_rate: float  # tokens a second while nothing but decodes runs
    prefill_rate: float  # prompt tokens a second that are computed, while nothing but prompts runs
    requests: float  # a second, where the two share the devices
    gpus: int
    output: int  # tokens of an answer
    decode: Terms = field(repr=False)
    prefill: Terms = field(repr=False)

    @property
    def output_rate(self) -> float:
        """Output tokens a second, prompts included."""
        return self.requests * self.output

    def told(self) -> dict[str, Any]:
        """For JSON. Memory in GiB, times in ms, rates of all devices and of one."""
        return {
            "layout": asdict(self.layout),
            "memory_gib": {
                name: round(getattr(self.memory, name) / GIB, 3) for name in ("weights", "work", "kv")
            } | {"kv_bytes_per_token": round(self.memory.per_token)},
            "rows_per_rank": self.rows,
            "requests_running": self.rows * self.layout.attn_dp * self.layout.dp,
            "itl_ms": round(self.itl * 1e3, 3),
            "ttft_ms": round(self.ttft * 1e3, 1),
            "requests_per_s": round(self.requests, 3),
            "output_tok_per_s": round(self.output_rate, 1),
            "decode_tok_per_s": round(self.decode_rate, 1),
            "prefill_tok_per_s": round(self.prefill_rate, 1),
            "per_gpu": {
                name: round(value / self.gpus, 1)
                for name, value in (
                    ("output_tok_per_s", self.output_rate),
                    ("decode_tok_per_s", self.decode_rate),
                    ("prefill_tok_per_s", self.prefill_rate),
                )
            },
            "bound": {"decode": self.decode.largest, "prefill": self.prefill.largest},
            "decode_terms_ms": {name: round(value * 1e3, 4) for name, value in self.decode.seconds.items()},
            "prefill_terms_ms": {name: round(value * 1e3, 4) for name, value in self.prefill.seconds.items()},
        }  # fmt: skip


def price(
    shape: Shape, layout: Layout, machine: Machine, load: Load, rates: Efficiency, parts: list[Stage]
) -> Price | str:
    """What a layout gives; or why it cannot serve the load."""
    usable = machine.memory_gib * GIB * load.fraction
    redundant = load.redundant if layout.ep > 1 else 0
    room = memory(shape, layout, parts, usable, load.longest, load.chunk, redundant)
    if room.kv <= 0:
        need = (room.weights + room.work) / GIB
        return f"weights and work memory take {need:.1f} of {usable / GIB:.1f} GiB"
    groups = layout.attn_dp * layout.dp
    rows = min(room.rows or (MOST_ROWS if not room.request else 0), MOST_ROWS)
    if rows < 1:
        need = room.request / GIB
        return f"{room.kv / GIB:.1f} GiB are left for KV, a request of {load.longest} tokens takes {need:.1f}"
    if load.batch:
        wanted = -(-load.batch // groups)
        if wanted > rows:
            return f"{wanted} requests a rank do not fit, {rows} do"
        rows = wanted
    costs = Costs(shape, layout, parts, machine, rates, redundant)
    rows = _within(costs, rows, load)
    if rows < 1:
        return f"one token takes more than {load.itl * 1e3:g} ms even with a single request"
    return _priced(costs, rows, load, room)


def _decoding(costs: Costs, rows: int, load: Load) -> tuple[float, Terms]:
    """Seconds between two tokens of a request: as many micro-batches as stages are on their way."""
    pp = costs.layout.pp
    terms = costs.slowest(Work.decode(max(rows / pp, 1.0), load.prompt + load.output / 2))
    return pp * terms.total, terms


def _within(costs: Costs, rows: int, load: Load) -> int:
    """The most rows up to these with which a token comes in time; 0: not even one does."""
    if not load.itl or _decoding(costs, rows, load)[0] <= load.itl:
        return rows
    low, high = 0, rows
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _decoding(costs, middle, load)[0] <= load.itl else (low, middle)
    return low


def _priced(costs: Costs, rows: int, load: Load, room: Memory) -> Price:
    layout = costs.layout
    groups = layout.attn_dp * layout.dp
    itl, decode = _decoding(costs, rows, load)
    fresh = max(1.0, load.prompt * (1 - load.hit))
    before = load.prompt * load.hit + fresh / 2
    chunk = Work.prefill(load.chunk, before, load.chunk / fresh)
    prefill = costs.slowest(chunk)
    prefill_rate = load.chunk * groups / prefill.total
    pieces = -(-fresh // load.chunk)
    alone = costs.seconds(Work.prefill(fresh / pieces, before))
    ttft = alone * (1 + (pieces - 1) / layout.pp)
    decode_rate = rows * groups / itl
    requests = 1 / (fresh / prefill_rate + load.output / decode_rate)
    return Price(
        layout, room, rows, itl, ttft, decode_rate, prefill_rate, requests, layout.world, load.output, decode, prefill
    )


@dataclass
class Answer:
    """The layouts that serve the load, best first, and how many of the others failed for which reason."""

    prices: list[Price]
    refused: list[tuple[Layout, str]]


def plan(
    shape: Shape, machine: Machine, gpus: int, load: Load, rates: Efficiency | None = None, only: Layout | None = None
) -> Answer:
    """Price every layout of `gpus` devices, or `only` one.

    Raises:
        ConfigError: no layout serves the load; the nearest miss is named.
    """
    load, rates = load.checked(), rates or Efficiency()
    if gpus < 1:
        raise ConfigError(f"gpus: {gpus} must be above 0", param="gpus")
    if load.longest > shape.context:
        raise ConfigError(
            f"{load.longest} tokens are more than the model's context of {shape.context}", param="context"
        )
    if only is not None:
        only = replace(only, dp=max(1, gpus // (only.tp * only.pp))) if only.dp == 1 else only
        why = refusal(shape, only, load.redundant) or ("" if only.world == gpus else f"it takes {only.world} of {gpus}")
        if why:
            raise ConfigError(f"layout {only}: {why}", param="layout")
    cut: dict[int, list[Stage]] = {}
    prices: list[Price] = []
    refused: list[tuple[Layout, str]] = []
    for layout in [only] if only is not None else layouts(shape, gpus, load.redundant):
        parts = cut.setdefault(layout.pp, []) or stages(shape, layout.pp)
        cut[layout.pp] = parts
        found = price(shape, layout, machine, load, rates, parts)
        if isinstance(found, str):
            refused.append((layout, found))
        else:
            prices.append(found)
    if not prices:
        raise ConfigError(_none(shape, machine, gpus, refused), param="gpus")
    prices.sort(key=lambda item: (-item.requests, item.layout.tp * item.layout.pp, item.layout.pp))
    return Answer(prices, refused)


def _none(shape: Shape, machine: Machine, gpus: int, refused: list[tuple[Layout, str]]) -> str:
    size = shape.weight_bytes / GIB
    head = f"{shape.name}: {size:.1f} GiB of weights; no layout of {gpus} x {machine.name} serves this"
    if not refused:
        return f"{head}: its {shape.heads} heads and {shape.experts} experts divide by none"
    layout, why = max(refused, key=lambda item: item[0].tp * item[0].pp)
    return f"{head}. {layout}: {why}"
