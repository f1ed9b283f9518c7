"""The least time that a step can take on this machine's CPU: what it must read, and what it must compute.

Decode reads every weight once, whatever the batch (a few rows a part of the head: `Screens`), and each row's keys and
values; prefill multiplies every token with every weight but the head's. The arithmetic counts at the peak of the
instructions that serve it: int8 for quantised weights, bfloat16 for others and for attention. Norms, rotation and
sampling count for nothing.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from time import perf_counter
from typing import TYPE_CHECKING, Any

from phloem.bench.kernels import Limits
from phloem.core.errors import BadRequest
from phloem.kernels import native
from phloem.kvcache.pool import KVPool

if TYPE_CHECKING:
    from phloem.layers.context import AttentionSpec


ROUNDS = 1_000_000  # of multiply-adds in registers: some milliseconds
READING = 0.5  # seconds of reading before the first steps


@dataclass(frozen=True)
class Peaks:
    """Limits of one moment: bytes a second, and operations a second (a multiply-add is two)."""

    read: float
    int8: float
    bf16: float


@dataclass(frozen=True)
class Work:
    """What steps of one model read and compute."""

    weight_bytes: int  # of every weight that a step reads, the head's among them
    kv_bytes: int  # of one token, over all layers
    int8: int  # operations of one token in all layers but the head
    bf16: int
    head_int8: int
    head_bf16: int
    specs: Sequence[AttentionSpec]
    head_rest: int = 0  # bytes of the head that a step of a few rows leaves out

    def decode_bytes(self, rows: int, context: int) -> int:
        return self._weights(rows) + rows * self.kv_bytes * context

    def _weights(self, rows: int) -> int:
        return self.weight_bytes - (self.head_rest if rows <= native.runtime().constant("linear.kScreenRows") else 0)

    def _pairs(self, queries: int, before: int) -> int:
        """Attention's operations of `queries` new tokens behind `before` others, in all layers."""
        total = 0
        for spec in self.specs:
            most = spec.window or before + queries
            seen = sum(min(most, before + place + 1) for place in range(queries))
            total += 4 * spec.heads * spec.head_size * seen
        return total

    def decode(self, rows: int, context: int, peaks: Peaks) -> tuple[float, float]:
        """Seconds for reading, and for computing, one decode step at `context` tokens a row."""
        int8, bf16 = rows * (self.int8 + self.head_int8), rows * (self.bf16 + self.head_bf16)
        computing = int8 / peaks.int8 + (bf16 + rows * self._pairs(1, context - 1)) / peaks.bf16
        return self.decode_bytes(rows, context) / peaks.read, computing

    def prefill(self, tokens: int, peaks: Peaks) -> tuple[float, float]:
        """The same for a prompt of `tokens`; the head sees its last one alone."""
        int8, bf16 = tokens * self.int8 + self.head_int8, tokens * self.bf16 + self.head_bf16
        computing = int8 / peaks.int8 + (bf16 + self._pairs(tokens, 0)) / peaks.bf16
        return (self._weights(1) + tokens * self.kv_bytes) / peaks.read, computing


def work_of(model: Any, pool: KVPool) -> Work:
    """Read off a loaded model.

    Raises:
        BadRequest: for weights that the native table did not pack, and for experts, of which a step reads some.
    """
    index = model.index
    embedding = model.embed.weight
    head = model.head.weight
    read, counts = 0, {"int8": 0, "bf16": 0, "head_int8": 0, "head_bf16": 0}
    for weight in index.weights:
        if weight.role != "matrix":
            continue
        if weight.experts:
            raise BadRequest("--limits is for dense models: what a step reads of experts depends on their router")
        if not hasattr(weight.value, "forms"):
            raise BadRequest("--limits is for weights of the native kernels: leave --ops out, and see `phloem doctor`")
        if weight is embedding and head is not embedding:
            continue  # of which a step reads a row for each token
        read += weight.value.nbytes
        kind = (
            "bf16"
            if weight.value.forms & (weight.value.native.sizes.half | weight.value.native.sizes.single)
            else "int8"
        )
        counts[f"head_{kind}" if weight is head else kind] += 2 * sum(prod(shape) for shape in weight.shapes)
    specs = model.attention_specs
    packed = head.value
    rest = packed.nbytes - packed.native.screens.bytes_read(packed)
    return Work(read, sum(KVPool.bytes_per_token(pool.memory, pool.dtype)), **counts, specs=specs, head_rest=rest)


def shares(
    work: Work,
    rows: int,
    context: int,
    tokens: int,
    turns: int,
    decode: Callable[[], float],
    prefill: Callable[[], Any],
) -> dict[str, Any]:
    """Steps in turns with the limits: on a shared machine both slow down together. Medians over the turns.

    Args:
        context: tokens of each row, the new one included.
        tokens: of the prompt; 0: no prefill is measured.
        decode: runs decode steps and gives the seconds of one.
        prefill: runs one prefill.

    Raises:
        BadRequest: where the native kernels, which measure the limits, are missing.
    """
    try:
        native.runtime()
    except native.Unavailable as error:
        raise BadRequest(f"--limits needs the native kernels: {error}") from error
    limits = Limits()
    size = work.decode_bytes(rows, context)
    found: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        found.setdefault(name, []).append(value)

    lasted = READING
    for _ in range(turns):
        _read_for(limits, size, lasted)  # decode finds the memory as it leaves it
        begun = perf_counter()
        step = decode()
        lasted = perf_counter() - begun
        peaks = _peaks(limits, size, lasted)
        for name in ("read", "int8", "bf16"):
            note(f"limit_{name}", getattr(peaks, name) / 1e9)
        _note_step(note, "decode", step, work.decode(rows, context, peaks))
        if tokens:
            begun = perf_counter()
            prefill()
            _note_step(note, "prefill", perf_counter() - begun, work.prefill(tokens, peaks))
    record: dict[str, Any] = {name: statistics.median(values) for name, values in found.items()}
    return {"weight_bytes": work.weight_bytes, "step_bytes": size, "turns": turns, **record}


def _peaks(limits: Limits, size: int, seconds: float) -> Peaks:
    """What the cores can do: the best of a few, as the first call finds threads asleep. What memory gives for as long
    as the steps took: some machines give more for a moment."""
    plain = limits.peaks[0]

    def best(kind: str) -> float:
        return max(limits.peak(kind, ROUNDS) for _ in range(3)) * 1e9

    int8, bf16 = (kind if kind in limits.peaks else plain for kind in ("int8", "bf16"))
    return Peaks(read=_read_for(limits, size, seconds), int8=best(int8), bf16=best(bf16))


def _read_for(limits: Limits, size: int, seconds: float) -> float:
    """Bytes a second of reading for so long: the median of the passes."""
    rates: list[float] = []
    begun = perf_counter()
    while not rates or perf_counter() - begun < seconds:
        rates.append(limits.read(size))
    return statistics.median(rates) * 1e9


def _note_step(note: Callable[[str, float], None], name: str, seconds: float, floors: tuple[float, float]) -> None:
    reading, computing = floors
    note(f"{name}_ms", seconds * 1e3)
    note(f"{name}_read_floor_ms", reading * 1e3)
    note(f"{name}_compute_floor_ms", computing * 1e3)
    note(f"{name}_share", max(floors) / seconds)


def show(record: dict[str, Any], rows: int, tokens: int) -> None:
    """Print what `shares` found."""
    print(
        f"limits of this machine: {record['limit_read']:.1f} GB/s over {record['step_bytes'] / 1e6:.0f} MB, "
        f"{record['limit_int8']:,.0f} Gop/s in int8, {record['limit_bf16']:,.0f} in bf16 (medians of {record['turns']})"
    )
    for name, count in (("decode", rows), ("prefill", tokens)):
        if f"{name}_share" in record:
            floor = max(record[f"{name}_read_floor_ms"], record[f"{name}_compute_floor_ms"])
            print(
                f"{name}: {record[f'{name}_ms']:.2f} ms ({count * 1e3 / record[f'{name}_ms']:,.0f} tok/s); floor "
                f"{floor:.2f} ms (reading {record[f'{name}_read_floor_ms']:.2f}, "
                f"computing {record[f'{name}_compute_floor_ms']:.2f}): {record[f'{name}_share']:.2f} of the limit"
            )
