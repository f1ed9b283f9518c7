"""Read the machine code of the kernels of two models for compute capability 9.0, without a GPU.

    python scripts/triton_code.py [--only TEXT] [--rows 1,8,...] [--markdown]

For each launch of a layer, in shapes of Llama-3.1-8B and Qwen3-30B-A3B: what the code has (registers, spills, width
of loads, tensor instruction), how many programs a multiprocessor holds, how many bytes are under way, and from these
the least time that each of four limits allows, on an H200. These are readings and bounds: nothing is run or measured.
A kernel whose share is far below 1 cannot reach its floor as it is; one whose share is 1 still may not.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent / "src")]
os.environ.setdefault("PYTHONWARNINGS", "ignore")

import torch  # noqa: E402
import triton_sass as sass  # noqa: E402
from triton_cases import BF16, F32, I32, I64, Case, batch, t  # noqa: E402
from triton_compile import TARGETS, Launch, compiled_for, cubin_usage, record  # noqa: E402

from phloem.kernels.ops import AttentionCall, Rotation  # noqa: E402
from phloem.kernels.triton import activation, attention, gemm_fp8, gemm_int, moe, norm, rope  # noqa: E402

TARGET = "sm_90"
PROCESSORS, CLOCK = 132, 1755  # multiprocessors; cycles a microsecond
RATE = 4.26e6  # bytes a microsecond: a copy that was measured on an H200
LATENCY = 0.7  # microseconds from a load to its bytes, with the memory busy
# Operations a microsecond of each tensor instruction: measured for the first two, a guess for the older one.
TENSOR = {"HGMMA": 671e6, "QGMMA": 1233e6, "HMMA": 400e6}
CONTEXT = 1024
ROWS = (1, 8, 32, 128, 256, 4096)


@dataclass(frozen=True)
class Work:
    """What all programs of a launch read of what is too large for the caches, in bytes, and multiply, in operations.

    `once`: bytes of memory, where programs read some of them several times. `programs`: those with something to do.
    """

    streamed: float
    operations: float = 0.0
    once: float = 0.0
    programs: float = 0.0


@dataclass
class Step:
    """Launches of a layer of a model at a number of rows, and the work of those that are more than a few bytes."""

    model: str
    rows: int
    name: str
    run: Callable[[torch.dtype], Any]
    work: dict[str, Work] = field(default_factory=dict[str, Work])


@dataclass
class Reading:
    """One launch."""

    step: str
    kernel: str
    programs: float
    warps: int
    shared: int
    code: sass.Code
    resident: int
    bytes_under_way: int  # of a program
    floor: float = 0.0  # microseconds: bytes or operations at the device's rates
    latency: float = 0.0
    issue: float = 0.0
    tensor: float = 0.0

    @property
    def waves(self) -> float:
        return self.programs / (PROCESSORS * max(self.resident, 1))

    @property
    def bound(self) -> float:
        return max(self.floor, self.latency, self.issue, self.tensor)


def _turn(launch: Launch) -> tuple[float, float]:
    """Bytes that a program loads in one turn of its main loop, as it is written: (streamed ones, all)."""
    c, kinds = dict(launch.constants), dict(launch.signature)
    size = 1 if "fp8" in kinds.get("weight", kinds.get("k_cache", "")) else 2
    match launch.kernel:
        case "_gemm_few" | "_gemm_fp8":
            width = 2 if launch.kernel == "_gemm_few" else 1
            return c["BLOCK_M"] * c["GROUP"], (c["BLOCK_M"] + width * c["BLOCK_T"]) * c["GROUP"]
        case "_gemm_int4":
            return c["BLOCK_M"] * c["GROUP"] / 2, (c["BLOCK_M"] / 2 + 2 * c["BLOCK_T"]) * c["GROUP"]
        case "_few_up":
            some = 2 * c["BLOCK_N"] * c["PARTS"] * c["BLOCK_K"] * size
            return some, some
        case "_few_down":
            some = c["PLACES"] * c["PARTS"] * c["BLOCK_N"] * c["BLOCK_K"] * size
            return some, some
        case "_grouped" | "_walk_grouped":
            some = (2 if c["GATED"] else 1) * c["BLOCK_N"] * c["BLOCK_K"] * size
            return some, some + c["TILE"] * c["BLOCK_K"] * size
        case "_attention":
            some = c["BLOCK_N"] * (c["HEAD"] + c["HEAD_V"]) * size
            return some, some
        case _:
            return 0.0, 0.0


def label(launch: Launch) -> str:
    gated = dict(launch.constants).get("GATED")
    return launch.kernel + ("" if gated is None else " up" if gated else " down")


def read(work: tuple[Step, Launch]) -> Reading:
    """Compile one launch and read it."""
    step, launch = work
    compiled = compiled_for(TARGETS[TARGET][0], launch)
    registers, _ = cubin_usage(compiled.asm["cubin"])
    code = sass.read(compiled.asm["cubin"], registers or 255)
    warps, shared = int(compiled.metadata.num_warps), int(compiled.metadata.shared)
    under_way = sass.under_way(code, compiled.asm["ttgir"], 32 * warps)
    found = Reading(
        step.name, label(launch), math.prod(launch.grid), warps, shared, code,
        sass.resident(code.registers, shared, warps), under_way,
    )  # fmt: skip
    if (todo := step.work.get(found.kernel)) is not None:
        whole = not dict(launch.constants).get("FLAT")  # in one loop with what follows a tile, turns cannot be counted
        _bound(found, todo, _turn(launch) if whole else (0.0, 0.0), code.loop_bytes(32 * warps))
    return found


def _bound(found: Reading, todo: Work, turn: tuple[float, float], loop_bytes: int) -> None:
    """The least times that each limit allows."""
    streamed, every = turn
    tensor = next((TENSOR[kind] for kind in found.code.products.split("+") if kind in TENSOR), TENSOR["HGMMA"])
    best = TENSOR["QGMMA"] if tensor == TENSOR["QGMMA"] else TENSOR["HGMMA"]
    found.programs = todo.programs or found.programs
    found.floor = max((todo.once or todo.streamed) / RATE, todo.operations / best)
    found.tensor = todo.operations / tensor
    if not streamed or not found.code.loop:
        return
    unrolled = max(1, round(loop_bytes / every))
    turns = todo.streamed / found.programs / streamed
    ahead = max(found.bytes_under_way / every, 1.0)
    waves = 1 if found.kernel.startswith("_walk") else math.ceil(found.waves)
    found.latency = LATENCY * (1 + waves * max(turns / ahead, 1.0))
    each = math.ceil(found.programs / PROCESSORS) * turns
    found.issue = each * found.code.slots / unrolled * found.warps / sass.SCHEDULERS / CLOCK


def _attend(rows: int, kv_heads: int, float8: torch.dtype | None) -> None:
    cache = t(1000, kv_heads, 16, 128, dtype=float8 or BF16)
    scales = None if float8 is None else (t(kv_heads, dtype=F32), t(kv_heads, dtype=F32))
    call = AttentionCall(128**-0.5, 0, 0.0, None)
    if rows == 4096:
        attention.extend_attention(t(rows, 32, 128), (cache, cache), batch(1, rows), call, scales=scales)
    else:
        attention.decode_attention(t(rows, 32, 128), (cache, cache), batch(rows, rows), call, scales=scales)


def _attention_work(rows: int, kv_heads: int, size: int) -> dict[str, Work]:
    if rows == 4096:
        tiles, each = rows / (128 / (32 // kv_heads)), 2 * 128 * size
        read = tiles * kv_heads * (rows / 2) * each
        return {"_attention": Work(read, 4 * rows * rows / 2 * 32 * 128, rows * kv_heads * each)}
    return {"_attention": Work(rows * CONTEXT * 2 * kv_heads * 128 * size)}


def _small(rows: int, size: int, kv_heads: int, between: int) -> None:
    x, weight = t(rows, size), t(size)
    norm.add_rms_norm(x, x, weight, 1e-6)
    q, k, v = t(rows, 32, 128), t(rows, kv_heads, 128), t(rows, kv_heads, 128)
    cache, slots, positions = t(1000, kv_heads, 16, 128), t(rows, dtype=I32), t(rows, dtype=I64)
    q_norm, k_norm = (t(128), t(128)) if kv_heads == 4 else (None, None)
    rotation = Rotation(positions, t(8192, 2, 64, dtype=F32), False, q_norm, k_norm, 1e-6)
    rope.rope_write_kv(q, k, v, rotation, cache, cache, slots, None)
    if between:
        activation.silu_and_mul(t(rows, 2 * between))


def _narrow(rows: int, outputs: int, inputs: int, blocks: bool, float8: torch.dtype) -> None:
    weight = t(outputs, inputs, dtype=float8)
    scale = t(outputs // 128, inputs // 128, dtype=F32) if blocks else t(outputs, dtype=F32)
    if rows <= gemm_fp8.FEW_ROWS:
        gemm_fp8.few_rows_gemm(t(rows, inputs), weight, scale, None)
    else:
        x = t(rows, inputs, dtype=float8), t(rows, inputs // 128, dtype=F32)
        gemm_fp8.block_scaled_gemm(*x, weight, scale, None, BF16)


def _four_bits(rows: int, outputs: int, inputs: int) -> None:
    scale = t(outputs, inputs // 128, dtype=torch.float16)
    gemm_int.int4_gemm(t(rows, inputs), t(outputs, inputs // 2, dtype=torch.uint8), scale, scale)


def _product_work(rows: int, outputs: int, inputs: int, size: float) -> dict[str, Work]:
    """Tiles of rows read the weights again, from the cache."""
    again = math.ceil(rows / 128) if size == 1 else math.ceil(rows / 64)
    once = outputs * inputs * size
    work = Work(once * again, 2.0 * rows * outputs * inputs, once)
    return {"_gemm_few": replace(work, operations=0), "_gemm_fp8": work, "_gemm_int4": work}


def _experts(rows: int, blocks: bool, float8: torch.dtype) -> None:
    dtype = float8 if blocks else BF16
    gate_up, down = t(128 * 1536, 2048, dtype=dtype), t(128 * 2048, 768, dtype=dtype)
    if blocks:
        gate_up = moe.Float8Blocks(gate_up, t(128 * 12, 16, dtype=F32))
        down = moe.Float8Blocks(down, t(128 * 16, 6, dtype=F32))
    moe.moe(t(rows, 2048), t(rows, 128), gate_up, down, 8, True)


def _experts_work(rows: int, size: int) -> dict[str, Work]:
    """Rows choose 8 of 128 experts at random."""
    pairs, experts = rows * 8, 128
    share, tile = 8 / experts, moe.tile_size(rows * 8, 128)
    tiles = busy = 0.0
    for n in range(rows + 1):
        log = math.lgamma(rows + 1) - math.lgamma(n + 1) - math.lgamma(rows - n + 1)
        chance = math.exp(log + n * math.log(share) + (rows - n) * math.log1p(-share))
        tiles += experts * chance * math.ceil(n / tile)
        busy += experts * chance * (n > 0)
    up, down = 1536 * 2048 * size, 768 * 2048 * size
    flops = 2.0 * pairs * 2048 * 768
    some = {"_few_up": Work(pairs * up), "_few_down": Work(pairs * down)}
    wide = 128 if tile >= 64 else 64
    for name, each, factor in ((" up", up, 2), (" down", down, 1)):
        rows_out = 768 if factor == 2 else 2048
        columns = (128 if size == 1 else 32 if tile >= 128 else 64) if factor == 2 else wide
        programs = tiles * math.ceil(rows_out / columns)
        some["_grouped" + name] = Work(tiles * each, factor * flops, busy * each, programs)
        some["_walk_grouped" + name] = Work(tiles * each, factor * flops, busy * each)
    return some


def steps(rows_of: Sequence[int]) -> list[Step]:
    found: list[Step] = []
    for rows in rows_of:
        for model, kv_heads, size, between in (("llama", 8, 4096, 14336), ("qwen", 4, 2048, 0)):

            def add(name: str, run: Callable[..., Any], work: dict[str, Work], model: str = model, rows: int = rows):
                found.append(Step(model, rows, f"{model}, {rows}: {name}", run, work))

            add("attention", lambda _, r=rows, k=kv_heads: _attend(r, k, None), _attention_work(rows, kv_heads, 2))
            add("attention, float8", partial(_attend, rows, kv_heads), _attention_work(rows, kv_heads, 1))
            add("small ones", lambda _, a=(rows, size, kv_heads, between): _small(*a), {})
            if model == "qwen":
                add("experts", partial(_experts, rows, False), _experts_work(rows, 2))
                add("experts, float8", partial(_experts, rows, True), _experts_work(rows, 1))
                continue
            for name, outputs, inputs in (("o", 4096, 4096), ("gate_up", 28672, 4096), ("down", 4096, 14336)):
                work = _product_work(rows, outputs, inputs, 1)
                add(f"{name}, blocks", partial(_narrow, rows, outputs, inputs, True), work)
                if rows <= gemm_fp8.FEW_ROWS:
                    add(f"{name}, rows", partial(_narrow, rows, outputs, inputs, False), work)
                four = _product_work(rows, outputs, inputs, 0.5)
                add(f"{name}, 4 bits", lambda _, a=(rows, outputs, inputs): _four_bits(*a), four)
    return found


def readings(chosen: Sequence[Step], processes: int | None = None) -> list[Reading]:
    todo = [
        (replace(step, run=print), launch) for step in chosen for launch in record([Case(step.name, step.run)], TARGET)
    ]
    with multiprocessing.get_context("spawn").Pool(processes or len(os.sched_getaffinity(0))) as pool:
        return pool.map(read, todo, chunksize=1)


def _widths(found: dict[int, int]) -> str:
    """16x4: four of 16 bytes; the widest first."""
    return " ".join(f"{width}x{number}" for width, number in sorted(found.items(), reverse=True)) or "-"


def cells(r: Reading) -> list[str]:
    code = r.code
    under_way = r.bytes_under_way * min(r.resident, math.ceil(r.programs / PROCESSORS)) / 1024
    times = [f"{v:.1f}" if v else "-" for v in (r.floor, r.latency, r.issue, r.tensor)]
    return [
        r.step, r.kernel, f"{r.programs:.0f}", f"{r.waves:.2f}", f"{r.warps}", f"{code.registers}", f"{code.spilled}",
        f"{r.shared / 1024:.0f}", f"{r.resident}", _widths(code.loads), _widths(code.copies), f"{code.bulk or '-'}",
        _widths(code.stores), code.products or "-", f"{code.slots}/{code.slow}", f"{under_way:.0f}", *times,
        f"{r.floor / r.bound:.2f}" if r.floor else "-",
    ]  # fmt: skip


HEAD = ["step", "kernel", "programs", "waves", "warps", "regs", "spills", "KiB", "held", "loads", "copies", "TMA",
        "stores", "tensor", "loop", "way", "floor", "latency", "issue", "product", "share"]  # fmt: skip


def table(found: Sequence[Reading], markdown: bool) -> str:
    rows = [HEAD, *(cells(r) for r in found)]
    if markdown:
        rows.insert(1, ["---"] * len(HEAD))
        return "\n".join("| " + " | ".join(row) + " |" for row in rows)
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEAD))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="steps whose name contains this")
    parser.add_argument("--rows", default=",".join(map(str, ROWS)))
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--processes", type=int)
    args = parser.parse_args()
    chosen = [step for step in steps([int(r) for r in args.rows.split(",")]) if args.only in step.name]
    print(table(readings(chosen, args.processes), args.markdown))
    return 0


if __name__ == "__main__":
    sys.exit(main())
