"""Each native kernel's GB/s and Gop/s, next to what the machine gives in the same moments.

Every kernel is timed in turns with the limit that bounds it (reading a buffer of the kernel's own size, or
multiply-adds from registers), and its share is the median over the turns: on a shared machine both slow down together.
"""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from phloem.bench._report import context, write_line
from phloem.core.config import CpuLevel, opt
from phloem.core.errors import BadRequest, PhloemError
from phloem.kernels import native
from phloem.kernels.ops import AttentionCall, Draw, Ops, PagedBatch, Rotation
from phloem.kernels.reference_experts import route
from phloem.platforms import cpu
from phloem.utils import memory

if TYPE_CHECKING:
    from torch import Tensor

# Of a 32-bit lane in one instruction or the shortest sequence that there is. int4: weights of so few bits that several
# products are added as words (AVX2), which is faster than int8.
OPERATIONS = {"float": 2, "bf16": 4, "int8": 8, "int4": 8}
LANES = {"portable": 4, "avx2": 8, "avxvnni": 8, "avx512": 16, "amx": 16, "neon": 4, "i8mm": 4}


@dataclass(frozen=True)
class Options:
    threads: int | None = opt(None, "Threads (default: the cores that this process may use).")
    cpu_level: CpuLevel = opt("auto", "Instruction set (default: PHLOEM_CPU_LEVEL, else the best).")
    turns: int = opt(7, "Alternating turns per kernel.")
    only: str | None = opt(None, "Only kernels whose name contains this.")
    weights: str = opt("Q4_1", "GGUF type of the weights of a layer's projections.")
    hidden: int = opt(576, "Features of the model's hidden state.")
    heads: int = opt(9, "Query heads.")
    kv_heads: int = opt(3, "KV heads.")
    head_size: int = opt(64, "Features of a head.")
    intermediate: int = opt(1536, "Features of the MLP.")
    vocab: int = opt(49152, "Vocabulary.")
    output: str | None = opt(None, "File to append JSON lines to.")


@dataclass(frozen=True)
class Case:
    """One thing to time: what one call reads and writes, and what it computes."""

    name: str
    run: Callable[[], Any]
    bytes: float = 0.0
    operations: float = 0.0
    peak: str = ""  # the arithmetic that bounds it; "": memory does


class Limits:
    """The machine's limits, measured when asked."""

    def __init__(self) -> None:
        self._rt = native.runtime()
        self._level = self._rt.library.level()
        self._threads = self._rt.library.threads()
        self._out = torch.empty(self._threads)
        self._buffers: dict[int, Tensor] = {}
        self._handles = {kind: self._rt.op(f"limit_{kind}") for kind in OPERATIONS if self._rt.has(f"limit_{kind}")}
        self._read = self._rt.op("limit_read")

    @property
    def peaks(self) -> list[str]:
        return list(self._handles)

    def read(self, size: int) -> float:
        """GB/s of one pass over a buffer of `size` bytes that was read just before. It lies where weights lie."""
        if size not in self._buffers:
            block = torch.from_numpy(memory.zeros(max(size // 4, 4096) * 4))
            self._buffers[size] = block.view(torch.float32).fill_(1)
        buffer = self._buffers[size]

        def once() -> None:
            self._rt.call(self._read, 1 << 30, data=buffer.data_ptr(), count=buffer.numel(), out=self._out.data_ptr())

        repeats = max(1, (8 << 20) // size)
        once()  # also wakes the threads
        start = perf_counter()
        for _ in range(repeats):
            once()
        return buffer.nbytes * repeats / (perf_counter() - start) / 1e9

    def peak(self, kind: str, rounds: int = 300_000) -> float:
        """Gop/s of multiply-adds in registers, a multiply-add counted as two."""
        start = perf_counter()
        self._rt.call(self._handles[kind], 1 << 30, rounds=rounds, out=self._out.data_ptr())
        seconds = perf_counter() - start
        return rounds * 12 * LANES[self._level] * OPERATIONS[kind] * self._threads / seconds / 1e9

    def bound(self, case: Case) -> float:
        if not case.peak:
            return self.read(max(1 << 16, int(case.bytes)))
        kind = case.peak if case.peak in self._handles else "float"
        return max(self.peak(kind) for _ in range(3))  # the first one may find threads asleep


def main(argv: list[str]) -> int:
    import tyro

    options = tyro.cli(Options, args=argv, prog="phloem bench kernels", description=__doc__)
    if options.weights not in _Blocks.FACTORS:
        raise BadRequest(f"weights: {options.weights!r} is not one of {', '.join(_Blocks.FACTORS)}", param="weights")
    try:
        level = cpu.level(options.cpu_level)
        ops = native.table(options.threads)
    except native.Unavailable as error:
        raise PhloemError(f"nothing to measure: {error}") from error
    for decision in level:
        print(f"{decision.name} {decision.value}: {decision.reason}")
    limits = Limits()
    about = {**context(), "level": native.runtime().library.level(), "threads": native.runtime().library.threads()}
    records = measure_limits(limits, options.turns)
    for case in cases(ops, options):
        if options.only is None or options.only in case.name:
            records.append(measure(case, limits, options.turns))
            show(records[-1])
    for record in records:
        if options.output:
            write_line(Path(options.output), {**record, **about})
    return 0


def level_limits(threads: int) -> list[tuple[str, str]]:
    """Each level that this processor runs, and in a few words the limits that a moment's measurement finds.

    Raises:
        Unavailable: where the library is missing.
    """
    library = native.runtime().library
    found: list[tuple[str, str]] = []
    try:
        library.set_threads(threads)
        for level in library.levels():
            library.set_level(level)
            limits = Limits()
            read = max(limits.read(64 << 20) for _ in range(4))
            peaks = [f"{kind} {max(limits.peak(kind, 30_000) for _ in range(5)):.0f}" for kind in limits.peaks]
            found.append((level, f"reads {read:.0f} GB/s; Gop/s of {', '.join(peaks)}; {threads} threads"))
    finally:
        library.set_level(native.runtime().forced)
    return found


def measure_limits(limits: Limits, turns: int) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = []
    for size in (24 << 20, 98 << 20, 256 << 20):
        limits.read(size)
        values = [limits.read(size) for _ in range(turns)]
        records.append({"limit": f"read {size >> 20} MiB", "unit": "GB/s", "median": statistics.median(values)})
    for kind in limits.peaks:
        values = [limits.peak(kind) for _ in range(turns)]
        records.append({"limit": f"{kind} multiply-add", "unit": "Gop/s", "median": statistics.median(values)})
    for record in records:
        print(json.dumps({key: round(v, 1) if isinstance(v, float) else v for key, v in record.items()}))
    return records


def measure(case: Case, limits: Limits, turns: int) -> dict[str, Any]:
    """Median time of a call, its rates, and its share of the bound."""
    case.run()
    start = perf_counter()
    case.run()
    repeats = max(1, min(2000, int(0.01 / max(perf_counter() - start, 1e-7))))
    seconds: list[float] = []
    shares: list[float] = []
    bounds: list[float] = []
    for _ in range(turns):
        bounds.append(limits.bound(case))
        start = perf_counter()
        for _ in range(repeats):
            case.run()
        seconds.append((perf_counter() - start) / repeats)
        done = case.operations if case.peak else case.bytes
        shares.append(done / seconds[-1] / 1e9 / bounds[-1])
    median = statistics.median(seconds)
    return {
        "kernel": case.name,
        "us": median * 1e6,
        "GB/s": case.bytes / median / 1e9,
        "Gop/s": case.operations / median / 1e9,
        "bound": case.peak or "memory",
        "limit": statistics.median(bounds),
        "share": statistics.median(shares),
    }


def show(record: dict[str, Any]) -> None:
    unit = "GB/s" if record["bound"] == "memory" else "Gop/s"
    print(
        f"{record['kernel']:<46} {record['us']:>10.1f} us {record[unit]:>8.1f} {unit:<6} "
        f"{record['share']:>5.2f} of {record['limit']:.0f} ({record['bound']})"
    )


def cases(ops: Ops, o: Options) -> list[Case]:
    makers = (_linear, _sparse, _rows, _attention, _packed, _sampling)
    return [case for make in makers for case in make(ops, o)]


class _Blocks:
    """A GGUF tensor of random blocks, whose float16 factors are 0.01."""

    # Bytes and weights of a block, and where its factors lie.
    FACTORS = {
        "Q4_0": (18, 32, (0,)), "Q4_1": (20, 32, (0, 2)), "Q5_0": (22, 32, (0,)), "Q5_1": (24, 32, (0, 2)),
        "Q8_0": (34, 32, (0,)), "IQ4_NL": (18, 32, (0,)), "Q2_K": (84, 256, (80, 82)), "Q3_K": (110, 256, (108,)),
        "Q4_K": (144, 256, (0, 2)), "Q5_K": (176, 256, (0, 2)), "Q6_K": (210, 256, (208,)),
    }  # fmt: skip

    def __init__(self, kind: str, out_features: int, in_features: int) -> None:
        self.name, self.kind = f"random {kind}", kind
        self.shape: tuple[int, ...] = (out_features, in_features)
        size, weights, factors = self.FACTORS[kind]
        count = -(-in_features // weights)
        blocks = np.random.default_rng(0).integers(0, 256, (out_features, count, size), np.uint8)
        for place in factors:
            blocks[..., place : place + 2] = np.full(1, 0.01, np.float16).view(np.uint8)
        self._raw = blocks.reshape(out_features, -1)

    def raw(self) -> np.ndarray[Any, np.dtype[np.uint8]]:
        return self._raw

    def dense(self, dtype: torch.dtype) -> Tensor:
        raise NotImplementedError("the native table packs the blocks themselves")


class _Dense:
    """A random bfloat16 weight."""

    kind = "dense"

    def __init__(self, out_features: int, in_features: int) -> None:
        self.name = "random dense"
        self.shape: tuple[int, ...] = (out_features, in_features)

    def dense(self, dtype: torch.dtype) -> Tensor:
        return (torch.randn(self.shape) * 0.02).to(dtype)

    def raw(self) -> np.ndarray[Any, np.dtype[np.uint8]]:
        raise NotImplementedError("dense weights have no blocks")


def _linear(ops: Ops, o: Options) -> list[Case]:
    """The layers of a model, fused as the models fuse them, in the types that the default model has unless asked."""
    heads = (o.heads + 2 * o.kv_heads) * o.head_size
    layers = {
        "qkv": (heads, o.hidden, o.weights),
        "gate_up": (2 * o.intermediate, o.hidden, o.weights),
        "down": (o.hidden, o.intermediate, o.weights),
        "head": (o.vocab, o.hidden, "Q8_0"),
        "gate_up, dense": (2 * o.intermediate, o.hidden, "dense"),
    }
    found: list[Case] = []
    for name, (out_features, in_features, kind) in layers.items():
        source = _Dense(out_features, in_features) if kind == "dense" else _Blocks(kind, out_features, in_features)
        # Copies, used in turn, so that a weight is read from memory as in a real step; the head is larger than caches.
        copies = max(1, min(64, (96 << 20) // (out_features * in_features)))
        weights = [ops.prepare_linear([source], torch.bfloat16, torch.device("cpu")) for _ in range(copies)]
        for rows in (1, 8, 32, 256, 1024):
            if name == "head" and rows > 32:
                continue
            x = torch.randn(rows, in_features)
            turn = itertools.cycle(weights)
            operations = 2.0 * rows * out_features * in_features
            found.append(
                Case(
                    f"linear {name} {kind} {rows} rows",
                    lambda x=x, turn=turn: ops.linear(x, next(turn)),
                    float(getattr(weights[0], "nbytes", 0)),
                    operations,
                    "" if rows <= 8 else "bf16" if kind == "dense" else "int8",
                )
            )
            if name == "head" and ops.linear_argmax is not None and ops.linear_topk is not None:
                few_rows = native.runtime().constant("linear.kScreenRows")
                best, few, scale = ops.linear_argmax, ops.linear_topk, torch.ones(rows, 2)
                more: list[Case] = []
                for label, run in (
                    ("arg-max", lambda x=x, w=weights[0], best=best: best(x, w)),
                    ("64 best", lambda x=x, w=weights[0], few=few: few(x, w, 64, None, 0, 0.0)),
                    ("64 best, 2 sums", lambda x=x, w=weights[0], few=few, s=scale: few(x, w, 64, s, 2, 0.0)),
                ):
                    reads = found[-1].bytes if label != "arg-max" or rows > few_rows else _screened(weights[0])
                    case = replace(found[-1], name=f"linear head {label} {kind} {rows} rows", run=run)
                    more.append(replace(case, bytes=reads))
                found += more
    return found


def _screened(head: Any) -> float:
    """Bytes of a head that the arg-max of a few rows reads."""
    return float(head.native.screens.bytes_read(head) if hasattr(head, "native") else head.nbytes)


def _sparse(ops: Ops, o: Options) -> list[Case]:
    """A sparse layer of 32 experts, 4 a token, each a quarter as wide as the dense layer's MLP."""
    experts, k, inner = 32, 4, max(32, o.intermediate // 4 // 32 * 32)
    up = [_Blocks("Q4_1", inner, o.hidden)] * (2 * experts)
    down = [_Blocks("Q4_1", o.hidden, inner)] * experts

    def pack(parts: list[_Blocks]) -> Any:
        return ops.prepare_experts(parts, torch.bfloat16, torch.device("cpu"), experts)

    # Copies as for linear layers.
    copies = max(1, min(16, (96 << 20) // (experts * inner * o.hidden)))
    layers = [(pack(up), pack(down)) for _ in range(copies)]
    nbytes = sum(float(getattr(weight, "nbytes", 0)) for weight in layers[0])
    found: list[Case] = []
    for rows in (1, 8, 32, 1024):
        x, logits = torch.randn(rows, o.hidden), torch.randn(rows, experts)
        chosen = len(route(logits, k, True)[1].unique())
        turn = itertools.cycle(layers)
        found.append(
            Case(
                f"moe Q4_1 {k} of {experts} experts, {rows} rows",
                lambda x=x, logits=logits, turn=turn: ops.moe(x, logits, *next(turn), k, True),
                nbytes * chosen / experts,
                6.0 * rows * k * inner * o.hidden,
                "" if rows <= 32 else "int8",
            )
        )
    return found


def _rows(ops: Ops, o: Options) -> list[Case]:
    found: list[Case] = []
    weight = torch.ones(o.hidden)
    cos_sin = torch.ones(4096, 2, o.head_size // 2)
    for rows in (1, 32, 1024):
        x, y = torch.randn(rows, o.hidden), torch.randn(rows, o.hidden)
        gate_up = torch.randn(rows, 2 * o.intermediate)
        q, k = torch.randn(rows, o.heads, o.head_size), torch.randn(rows, o.kv_heads, o.head_size)
        cache = torch.zeros(rows // 16 + 2, o.kv_heads, 16, o.head_size, dtype=torch.bfloat16)
        positions, slots = torch.arange(rows), torch.arange(rows, dtype=torch.int32)
        found += [
            Case(f"rms_norm {rows} rows", lambda x=x: ops.rms_norm(x, weight, 1e-5), 2.0 * x.nbytes),
            Case(f"add_rms_norm {rows} rows", lambda x=x, y=y: ops.add_rms_norm(x, y, weight, 1e-5), 4.0 * x.nbytes),
            Case(f"silu_and_mul {rows} rows", lambda x=gate_up: ops.silu_and_mul(x), 1.5 * gate_up.nbytes),
            Case(
                f"rope {rows} rows",
                lambda q=q, k=k, p=positions: ops.rope_(q, k, p, cos_sin, False),
                2.0 * (q.nbytes + k.nbytes),
            ),
            Case(
                f"write_kv bf16 {rows} rows",
                lambda k=k, cache=cache, slots=slots: ops.write_kv(k, k, cache, cache, slots),
                3.0 * k.nbytes,
            ),
        ]
        if ops.rope_write_kv is not None:
            turn, fused = Rotation(positions, cos_sin), ops.rope_write_kv
            found.append(
                Case(
                    f"rope + write_kv bf16 {rows} rows",
                    lambda q=q, k=k, t=turn, c=cache, s=slots, fused=fused: fused(q, k, k, t, c, c, s),
                    2.0 * q.nbytes + 4.0 * k.nbytes,
                )
            )
    return found


def _paged(lengths: list[int], queries: list[int]) -> tuple[PagedBatch, int]:
    counts = [-(-length // 16) for length in lengths]
    pages = torch.randperm(sum(counts)).to(torch.int32) + 1
    table = torch.zeros(len(lengths), max(counts), dtype=torch.int32)
    for row, part in enumerate(pages.split(counts)):
        table[row, : len(part)] = part
    start = torch.tensor([0, *torch.tensor(queries).cumsum(0).tolist()], dtype=torch.int32)
    slots = torch.zeros(sum(queries), dtype=torch.int32)
    lens = torch.tensor(lengths, dtype=torch.int32)
    return PagedBatch(start, lens, table, slots, max(queries), max(lengths)), sum(counts) + 1


def _attention(ops: Ops, o: Options) -> list[Case]:
    found: list[Case] = []
    size, scale = o.head_size, o.head_size**-0.5
    peaks = {torch.bfloat16: "bf16", torch.int8: "int8", torch.float32: "float"}

    def add(name: str, lengths: list[int], queries: list[int], kind: torch.dtype) -> None:
        batch, pages = _paged(lengths, queries)
        q = torch.randn(sum(queries), o.heads, size)
        shape = (pages, o.kv_heads, 16, size + 4 * (kind == torch.int8))
        caches = [torch.zeros(shape, dtype=kind) for _ in "kv"]
        slots = torch.arange(pages * 16, dtype=torch.int32)
        k, v = (torch.randn(len(slots), o.kv_heads, size) for _ in "kv")
        ops.write_kv(k, v, caches[0], caches[1], slots)
        pairs = sum(n * length - n * (n - 1) / 2 for n, length in zip(queries, lengths, strict=True))
        read = sum(lengths) * 2 * o.kv_heads * shape[3] * kind.itemsize
        decode = max(queries) == 1
        found.append(
            Case(
                f"attention {str(kind)[6:]} {name}",
                partial(ops.paged_attention, q, (caches[0], caches[1]), batch, AttentionCall(scale)),
                float(read),
                4.0 * o.heads * size * pairs,
                "" if decode else peaks[kind],
            )
        )

    for kind in peaks:
        add("decode 1 x 320", [320], [1], kind)
        add("decode 1 x 8192", [8192], [1], kind)
        add("decode 32 x 320", [320] * 32, [1] * 32, kind)
        add("decode 64 x 2048", [2048] * 64, [1] * 64, kind)
        add("prefill 1 x 1800", [1800], [1800], kind)
        add("prefill 8 x 256", [256] * 8, [256] * 8, kind)
        add("extend 8 x 32 after 1024", [1056] * 8, [32] * 8, kind)
    return found


def _packed(ops: Ops, o: Options) -> list[Case]:
    """Whole texts or pictures that see themselves both ways, q, k and v side by side as a layer gives them."""
    found: list[Case] = []
    for rows, length in ((64, 64), (1, 1024), (4, 1024), (1, 4096)):
        widths = [o.heads * o.head_size, o.kv_heads * o.head_size, o.kv_heads * o.head_size]
        made = torch.randn(rows * length, sum(widths))
        q, k, v = (part.unflatten(-1, (-1, o.head_size)) for part in made.split(widths, -1))
        starts = torch.arange(0, rows * length + 1, length, dtype=torch.int32)
        call = AttentionCall(o.head_size**-0.5, causal=False)
        found.append(
            Case(
                f"attention packed {rows} x {length}",
                partial(ops.packed_attention, q, k, v, starts, call, None),
                float(made.nbytes + q.nbytes),
                4.0 * o.heads * o.head_size * rows * length**2,
                "float",
            )
        )
    return found


def _sampling(ops: Ops, o: Options) -> list[Case]:
    found: list[Case] = []
    assert ops.sample is not None
    for rows in (1, 32):
        logits = torch.randn(rows, o.vocab) * 3
        settings = {"plain": (-1, 1.0, 0.0), "top_p 0.95": (-1, 0.95, 0.0), "top_k 50": (50, 1.0, 0.0)}
        found += [
            Case(f"argmax {rows} rows", lambda x=logits: ops.argmax(x), float(logits.nbytes)),
            Case(f"logsumexp {rows} rows", lambda x=logits: ops.logsumexp(x), float(logits.nbytes)),
            Case(f"top_k 20, {rows} rows", lambda x=logits: ops.top_k(x, 20), float(logits.nbytes)),
        ]
        for name, (top_k, top_p, min_p) in settings.items():
            draw = Draw(
                torch.ones(rows),
                torch.full((rows,), top_k, dtype=torch.int32),
                torch.full((rows,), top_p),
                torch.full((rows,), min_p),
                torch.arange(rows),
                torch.arange(rows),
            )
            found.append(Case(f"sample {name} {rows} rows", partial(ops.sample, logits, draw), float(logits.nbytes)))
    return found
