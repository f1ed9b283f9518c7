"""Linear layers and embeddings over packed weights: quantised checkpoints stay quantised, in the layouts of
csrc/cpu/linear/layout.h.

Activations are quantised as they come: int8 with one scale per 32 inputs for integer weights, bfloat16 for bfloat16
weights, float32 for the rest. Where more than 24 rows are multiplied at once (with AVX-512), integer weights of fewer
than 8 bits are taken as bytes with one scale per output feature and 128 or 64 inputs, and 64 inputs of a row may have
one scale (csrc/cpu/linear/bytes.h), unless `exact`: then a row's result does not depend on the rows beside it. It never
depends on the number of threads. `exact` also reads heads whole, of which `linear_argmax` otherwise reads most in four
bits (_native_screen.py).

With `float32`, activations stay as they are: weights of fewer than 16 bits, and bfloat16 ones, whose kernels round what
they multiply, are unpacked to float32 when they are prepared. That takes up to eight times their memory.

Legend: T rows, N inputs, M outputs.
"""

from __future__ import annotations

import functools
import threading
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from phloem.core.errors import ModelLoadError
from phloem.kernels import compose
from phloem.kernels._native_adapters import adder
from phloem.kernels._native_basic import norm_weight, rows_of
from phloem.kernels._native_basic import ops as basic_ops
from phloem.kernels._native_screen import Screens
from phloem.kernels.compose import check_options
from phloem.utils.memory import zeros

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from phloem.kernels._native_runtime import Runtime
    from phloem.kernels.calls import Adapters, Norm, WeightSource

# The layout in csrc/cpu/linear/layout.h that each GGUF type is packed in.
LAYOUTS = {
    "Q4_0": "kQ4S", "Q4_1": "kQ4M", "Q5_0": "kQ5S", "Q5_1": "kQ5M", "Q8_0": "kQ8S",
    "Q2_K": "kQ2K", "Q3_K": "kQ3K", "Q4_K": "kQ4K", "Q5_K": "kQ5K", "Q6_K": "kQ6K", "IQ4_NL": "kQ4N",
}  # fmt: skip
FLOATS = {"BF16": ("kBF16", torch.bfloat16), "F16": ("kF16", torch.float16), "F32": ("kF32", torch.float32)}
NAME_OF = {dtype: name for name, (_, dtype) in FLOATS.items()}
SPLIT = "kQ8P"  # Q8_0 whose upper and lower halves of bytes lie apart, for weights as tall as a vocabulary
TALL = 16384
PANEL_BYTES = 1 << 20  # activations of one panel of rows, at most: about a second-level cache
SLAB = 32 << 20
TOP_ROWS = 64  # rows of a panel of linear_topk: their candidates and sums stay in a second-level cache


class Sizes:
    """What the kernels and this file must agree on, read from the library."""

    def __init__(self, rt: Runtime) -> None:
        layout, linear = (functools.partial(_named, rt, room) for room in ("layout", "linear"))
        self.block = layout("kBlock")  # output features per packed block
        self.chunk = layout("kChunk")  # inputs of one scale
        self.int8, self.half, self.single = linear("kInt8"), linear("kHalf"), linear("kSingle")  # forms of activations
        self.exact = linear("kExact")  # beside them: weights keep their own form however many rows there are
        self.epilogues = {"": linear("kStore"), "silu": linear("kSiluMul"), "gelu_tanh": linear("kGeluMul")}
        self.tile_chunk = linear("kMostTileChunk")  # workspace of one unpacked block per chunk of inputs, at most
        self.line = linear("kLine")  # bytes of a prepared chunk of int8 activations
        self.top_columns = linear("kTopColumns")  # columns whose exponentials linear_topk adds together
        self.top_state = linear("kTopStateBytes")  # and what it keeps of them
        self.screen_rows = linear("kScreenRows")
        self.numbers = {name: layout(name) for name in [*LAYOUTS.values(), *(f[0] for f in FLOATS.values()), SPLIT]}
        self.formats = {number: name for name, number in self.numbers.items()}
        geometry = torch.empty(layout("kLayoutCount"), 4, dtype=torch.int64)
        rt.library.ask(rt.op("linear_geometry"), out=geometry.data_ptr())
        # Of each layout: inputs and bytes of a unit; weights and bytes of the GGUF block that becomes one.
        self.geometry: list[list[int]] = geometry.tolist()

    def block_of(self, kind: str) -> tuple[int, int]:
        """Weights and bytes of a block of a GGUF type."""
        weights, size = self.geometry[self.numbers[LAYOUTS[kind]]][2:]
        return weights, size

    def form(self, layout: int) -> int:
        """The form of activations that a layout takes."""
        name = self.formats[layout]
        return self.half if name == "kBF16" else self.single if name in ("kF16", "kF32") else self.int8

    def row_bytes(self, padded: int, forms: int) -> int:
        """Of one row of prepared activations, as `Rows` of csrc/cpu/linear/job.h."""
        row = ((padded // self.chunk) | 1) * self.line if forms & self.int8 else 0
        row += padded * 2 + 64 if forms & self.half else 0
        return row + (padded * 4 + 64 if forms & self.single else 0)

    def tile_bytes(self, padded: int) -> int:
        """Workspace of a thread for a pair of unpacked blocks."""
        return 2 * (padded // self.chunk * self.tile_chunk + 64)


def _named(rt: Runtime, room: str, name: str) -> int:
    return rt.constant(f"{room}.{name}")


@dataclass(slots=True, eq=False)
class PackedLinear:
    """The weight of a (fused) linear layer as the kernels read it. Made by `prepare_linear`."""

    in_features: int
    out_features: int
    padded_inputs: int
    kinds: tuple[str, ...]  # format of each part, as the checkpoint has it: "Q4_1", "BF16", ...
    forms: int  # bits: see `Sizes`
    paired: bool  # gate and up interleaved: `gated` can combine them
    nbytes: int
    dtype: torch.dtype  # the type that the model computes in
    segments: Tensor  # [S, 6] int64: data, layout, blocks, features, first column, half
    memory: list[Tensor]
    native: NativeLinear
    bias: tuple[Tensor, Tensor] | None = field(default=None)  # the last bias seen, and it in float32
    screen: Tensor | None = field(default=None)  # see `Screens.of`
    screenless: bool = False  # it has been found that there is none
    split: bool = False  # its layout is SPLIT

    @property
    def shape(self) -> tuple[int, int]:
        return (self.out_features, self.in_features)

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The whole weight `[out_features, in_features]`, dequantised."""
        ids = torch.arange(self.out_features)
        return self.native.embedding(ids, self, 1.0).to(dtype)


@dataclass(slots=True)
class _Part:
    data: Tensor  # uint8 [M, bytes per row]
    layout: int
    kind: str


@dataclass(frozen=True, slots=True)
class _Arrangement:
    """Where the parts of one weight lie: several of one layout side by side in one segment."""

    sizes: list[int]  # out_features of each part
    padded: int
    paired: bool
    groups: list[list[int]]  # the parts of each segment
    bytes: list[int] = field(default_factory=list)  # of each segment
    segments: list[list[int]] = field(default_factory=list)  # as `PackedLinear.segments`, but for the address


class _Store:
    """Memory of packed weights: large mappings, on huge pages where the system has them, cut from the front.

    A mapping is freed when the last weight in it is.
    """

    def __init__(self) -> None:
        self.slab: Tensor | None = None
        self.used = 0

    def take(self, size: int) -> Tensor:
        size = (size + 63) // 64 * 64
        if self.slab is None or self.used + size > self.slab.numel():
            self.slab, self.used = torch.from_numpy(zeros(max(SLAB, size))), 0
        self.used += size
        return self.slab[self.used - size : self.used]


class _Workspace(threading.local):
    """Scratch memory of eager calls, one per calling thread; a recording takes it from its arena."""

    def __init__(self) -> None:
        with _disable_current_modes():  # a thread's first op may be one that is recorded
            self.buffer = torch.empty(0, dtype=torch.uint8)

    def take(self, size: int, rt: Runtime) -> Tensor:
        if rt.recording:
            return rt.empty((size,), torch.uint8)
        if size > self.buffer.numel():
            self.buffer = torch.empty(max(size, 2 * self.buffer.numel()), dtype=torch.uint8)
        return self.buffer


@dataclass(frozen=True, slots=True)
class _Plan:
    """How one call is cut, and its workspace."""

    panel: int  # rows at a time
    tile: int  # bytes per thread for unpacked weights
    alone: int  # 1: each thread prepares all rows for itself
    threads: int  # that the workspace has room for
    space: Tensor


@lru_cache
def _rounded(value: float, dtype: torch.dtype) -> float:
    """`value` rounded to a type; outside of what a recorder watches."""
    with _disable_current_modes():
        return float(torch.tensor(value, dtype=dtype))


def _read(part: WeightSource, dtype: torch.dtype, sizes: Sizes, unpack: bool) -> _Part:
    """A part's bytes, as stored where there is a layout for them, else dense in `dtype`; `unpack`: dense in float32."""
    out_features, in_features = part.shape
    kind = part.kind
    if unpack and kind not in ("F16", "F32"):
        kind, dtype = "dense", torch.float32
    if kind not in LAYOUTS and kind not in FLOATS:
        tensor = part.dense(dtype if dtype in NAME_OF else torch.float32).contiguous()
        kind = NAME_OF[tensor.dtype]
        data = tensor.view(torch.uint8).reshape(out_features, -1)
        return _Part(data, sizes.numbers[FLOATS[kind][0]], kind)
    raw = part.raw()
    if kind in FLOATS:
        layout, row_bytes = FLOATS[kind][0], in_features * FLOATS[kind][1].itemsize
    else:
        layout, (block, block_bytes) = LAYOUTS[kind], sizes.block_of(kind)
        row_bytes = -(-in_features // block) * block_bytes
    if raw.shape != (out_features, row_bytes):
        raise ModelLoadError(
            f"{part.name}: {kind} data of shape {tuple(raw.shape)} do not fit a weight of shape {tuple(part.shape)}, "
            f"which takes [{out_features}, {row_bytes}] bytes"
        )
    return _Part(_as_tensor(raw), sizes.numbers[layout], kind)


def _as_tensor(raw: Any) -> Tensor:
    """A tensor over an array's memory, which may be a read-only mapping (nothing here writes to it)."""
    import warnings

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not writable.*")
        tensor = torch.from_numpy(raw)
    return tensor if tensor.is_contiguous() else tensor.contiguous()


class NativeLinear:
    """The linear ops over one runtime: `prepare_linear`, `linear`, the heads and `embedding` are the table's."""

    def __init__(self, rt: Runtime, *, exact: bool = False, float32: bool = False) -> None:
        self.rt = rt
        self.exact = exact
        self.float32 = float32
        self.screened = not (exact or float32)  # a screen rounds what it multiplies
        self.store = _Store()
        self.sizes = Sizes(rt)
        basic = basic_ops(rt)
        self.gates = {"silu": basic["silu_and_mul"], "gelu_tanh": basic["gelu_tanh_and_mul"]}
        names = ("rms_norm", "add_rms_norm", "silu_and_mul", "gelu_tanh_and_mul")
        ops = {name: basic[name] for name in names}
        self.apart = compose.linear_of(self._product, **ops, add_adapters=adder(rt))
        self.workspace = _Workspace()
        self.LINEAR, self.ARGMAX, self.ROWS = rt.op("linear"), rt.op("linear_argmax"), rt.op("linear_rows")
        self.TOPK, self.SCREENED = rt.op("linear_topk"), rt.op("linear_argmax_screened")
        self.parts = rt.has("own_ids")  # not in libraries of older builds
        self.OWN, self.CLEAR = (rt.op(name) if self.parts else -1 for name in ("own_ids", "clear_others"))
        self.screens = Screens(rt, self.sizes)
        self.PACK, self.PACK_DENSE = rt.op("linear_pack"), rt.op("linear_pack_dense")

    # ---- weights ----

    def prepare_linear(self, parts: Sequence[WeightSource], dtype: torch.dtype, device: torch.device) -> PackedLinear:
        """Packs the parts of one fused layer, stacked along out_features. Raises `ModelLoadError` for data that do
        not fit their shape."""
        read = [_read(part, dtype, self.sizes, self.float32) for part in parts]
        if len(parts) == 1 and parts[0].shape[0] >= TALL and read[0].kind == "Q8_0" and self.screened:
            read[0].layout = self.sizes.numbers[SPLIT]
        plan = self._arranged(parts, read)
        memory = [self.store.take(size) for size in plan.bytes]
        self._fill(read, plan, memory)
        forms = self.sizes.exact if self.exact else 0
        for part in read:
            forms |= self.sizes.form(part.layout)
        segments = [[data.data_ptr(), *rest] for data, rest in zip(memory, plan.segments, strict=True)]
        return PackedLinear(
            parts[0].shape[1], sum(plan.sizes), plan.padded, tuple(part.kind for part in read), forms, plan.paired,
            sum(data.numel() for data in memory), dtype, torch.tensor(segments), memory, self,
            split=read[0].layout == self.sizes.numbers[SPLIT],
        )  # fmt: skip

    def rewriting(self, old: Any, parts: Sequence[WeightSource], dtype: torch.dtype) -> Callable[[], None] | None:
        """What packs new values of a weight into the memory of the old ones, in one pass, when it is called. The parts
        are read now. None: they are not stored as numbers of one float type each, or the old weight has another layout.
        """
        if not isinstance(old, PackedLinear) or old.screen is not None or any(p.kind in LAYOUTS for p in parts):
            return None
        read = [_read(part, dtype, self.sizes, self.float32) for part in parts]
        plan = self._arranged(parts, read)
        same = old.shape == (sum(plan.sizes), parts[0].shape[1]) and old.kinds == tuple(part.kind for part in read)
        if not same or old.paired != plan.paired or old.segments[:, 1:].tolist() != plan.segments:
            return None
        return lambda: self._fill(read, plan, old.memory)

    def _arranged(self, parts: Sequence[WeightSource], read: list[_Part]) -> _Arrangement:
        in_features, block = parts[0].shape[1], self.sizes.block
        for part in parts:
            if part.shape[1] != in_features:
                raise ModelLoadError(f"{part.name}: {part.shape[1]} inputs, but {parts[0].name} has {in_features}")
        unit = 256 if any(part.kind.endswith("_K") for part in read) else 64
        padded = -(-in_features // unit) * unit
        sizes = [part.shape[0] for part in parts]
        paired = len(read) == 2 and read[0].layout == read[1].layout and sizes[0] == sizes[1] and sizes[0] % block == 0
        found = _Arrangement(sizes, padded, paired, [[0, 1]] if paired else _runs(read, sizes, block))
        column = 0
        for group in found.groups:
            blocks, layout = sum(-(-sizes[i] // block) for i in group), read[group[0]].layout
            found.bytes.append(blocks * self._block_bytes(layout, padded))
            features = sum(sizes[i] for i in group)
            found.segments.append([layout, blocks, features, column, sizes[0] if paired else 0])
            column += features
        return found

    def _fill(self, read: list[_Part], plan: _Arrangement, memory: list[Tensor]) -> None:
        for group, data in zip(plan.groups, memory, strict=True):
            first = 0
            for turn, i in enumerate(group):
                at, step = (turn, 2) if plan.paired else (first, 1)
                self._pack(read[i], plan.sizes[i], data, plan.padded, at, step)
                first += -(-plan.sizes[i] // self.sizes.block)

    def _block_bytes(self, layout: int, padded: int) -> int:
        inputs, size = self.sizes.geometry[layout][:2]
        return padded // inputs * size

    def _pack(self, part: _Part, rows: int, target: Tensor, padded: int, first: int, step: int) -> None:
        self.rt.call(
            self.PACK_DENSE if part.kind in FLOATS else self.PACK, part.data.numel(),
            source=part.data.data_ptr(), target=target.data_ptr(), rows=rows, row_bytes=part.data.shape[1],
            kind=part.layout, units=padded // self.sizes.geometry[part.layout][0], first_block=first, block_step=step,
        )  # fmt: skip

    # ---- the table's ops ----

    def linear(
        self,
        x: Tensor,
        weight: PackedLinear,
        bias: Tensor | None = None,
        *,
        norm: Norm | None = None,
        residual: Tensor | None = None,
        gate: str = "",
        add: Tensor | None = None,
        adapter: Adapters | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """`LinearOp` in one native op, but for three things. A gate and an up projection of two formats are combined
        in another. An adapter takes it all apart. And `add` is included for one row alone, where each thread adds where
        it has just written: adding column by column is slower than by the norm, which reads whole rows."""
        check_options(norm, residual, add)
        if adapter is not None:
            return self.apart(x, weight, bias, norm=norm, residual=residual, gate=gate, add=add, adapter=adapter)
        inside = gate if weight.paired else ""
        added = add if inside == gate and x.shape[0] == 1 else None
        out, total = self.fused(x, weight, bias, addend=residual, norm=norm, activation=inside, residual=added)
        if gate and not inside:
            out = self.gates[gate](out)
        if norm is not None:
            return out, x if total is None else total
        return out, None if added is not None else add

    def _product(self, x: Tensor, weight: PackedLinear, bias: Tensor | None) -> Tensor:
        return self.fused(x, weight, bias)[0]

    def embedding(self, ids: Tensor, weight: PackedLinear, scale: float) -> Tensor:
        """Rows of the packed weight as float32, times `scale` rounded to the model's type. ids int64."""
        if ids.dtype != torch.int64 or not ids.is_contiguous():
            ids = ids.to(torch.int64).contiguous()
        if scale != 1.0:
            scale = _rounded(scale, weight.dtype)
        out = self.rt.empty((*ids.shape, weight.in_features))
        count, n = ids.numel(), weight.in_features
        self.rt.call(
            self.ROWS, count * n, ids=ids.data_ptr(), count=count, scale=scale, out=out.data_ptr(), out_stride=n,
            parts=weight.segments.data_ptr(), part_count=weight.segments.shape[0], inputs=n,
            padded_inputs=weight.padded_inputs,
        )  # fmt: skip
        return out

    def embedding_part(self, ids: Tensor, weight: PackedLinear, scale: float, first: int, last: int) -> Tensor:
        """As `Ops.embedding_part`."""
        if ids.dtype != torch.int64 or not ids.is_contiguous():
            ids = ids.to(torch.int64).contiguous()
        own, count = self.rt.empty(ids.shape, torch.int64), ids.numel()
        self.rt.call(self.OWN, count, ids=ids.data_ptr(), out=own.data_ptr(), count=count, first=first, last=last)
        rows, n = self.embedding(own, weight, scale), weight.in_features
        self.rt.call(
            self.CLEAR, count * n // 8, ids=ids.data_ptr(), x=rows.data_ptr(), rows=count, n=n, first=first, last=last
        )  # fmt: skip
        return rows

    def fused(
        self,
        x: Tensor,
        weight: PackedLinear,
        bias: Tensor | None = None,
        *,
        addend: Tensor | None = None,
        norm: Norm | None = None,
        activation: str = "",
        residual: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """activation(norm(x + addend) W^T + bias) + residual, and x + addend (None without addend).

        `activation` "silu" or "gelu_tanh" multiplies the activated first half of
        the outputs (gate) with the second (up) and needs `weight.paired`.
        """
        x_TN, rows, n = self._input(x, weight)
        columns = weight.out_features
        if activation:
            if not weight.paired:
                raise ValueError("a gated activation needs a weight of two equal parts")
            columns //= 2
        norm_data, eps = (None, 0.0) if norm is None else (norm_weight(norm.weight, n), norm.eps)
        if addend is not None and addend.shape != x.shape:
            raise ValueError(f"cannot add {list(addend.shape)} to {list(x.shape)}")
        if residual is not None and residual.shape != (*x.shape[:-1], columns):
            raise ValueError(f"cannot add residual {list(residual.shape)} to {[*x.shape[:-1], columns]}")
        add_TN = None if addend is None else rows_of(addend)
        total = None if addend is None else self.rt.empty(x.shape)
        res_TM = None if residual is None else rows_of(residual)
        out = self.rt.empty((*x.shape[:-1], columns))
        plan = self._plan(rows, weight)
        self.rt.call(
            self.LINEAR, self._work(rows, weight),
            x=x_TN.data_ptr(), rows=rows, inputs=n, x_stride=x_TN.stride(0), norm=norm_data, eps=eps,
            addend=_pointer(add_TN), addend_stride=_stride(add_TN), sum=_pointer(total), sum_stride=n,
            segments=weight.segments.data_ptr(), segment_count=weight.segments.shape[0], kinds=weight.forms,
            padded_inputs=weight.padded_inputs, bias=self._bias(bias, weight),
            epilogue=self.sizes.epilogues[activation], residual=_pointer(res_TM), residual_stride=_stride(res_TM),
            out=out.data_ptr(), out_stride=columns, workspace=plan.space.data_ptr(),
            panel_rows=plan.panel, tile_bytes=plan.tile, alone=plan.alone, threads=plan.threads,
        )  # fmt: skip
        return out, total

    def linear_argmax(self, x: Tensor, weight: PackedLinear, bias: Tensor | None = None) -> Tensor:
        """The first largest of each row of x W^T, int32 [T], without the row."""
        x_TN, rows, n = self._input(x, weight)
        token = self.rt.empty((rows,), torch.int32)
        screen = None if not self.screened or bias is not None else self.screens.of(weight, rows)
        if screen is not None:
            self._screened(x_TN, weight, screen, token)
            return token
        best = min(rows, 512) * self.sizes.block * 8
        plan = self._plan(rows, weight, best)
        self.rt.call(
            self.ARGMAX, self._work(rows, weight),
            x=x_TN.data_ptr(), rows=rows, inputs=n, x_stride=x_TN.stride(0), norm=None, eps=0.0,
            addend=None, addend_stride=0, sum=None, sum_stride=0,
            segments=weight.segments.data_ptr(), segment_count=weight.segments.shape[0], kinds=weight.forms,
            padded_inputs=weight.padded_inputs, bias=self._bias(bias, weight), token=token.data_ptr(), logit=None,
            workspace=plan.space.data_ptr(), panel_rows=plan.panel, tile_bytes=plan.tile, best_bytes=best,
            alone=plan.alone, threads=plan.threads,
        )  # fmt: skip
        return token

    def _screened(self, x_TN: Tensor, weight: PackedLinear, screen: Tensor, token: Tensor) -> None:
        (rows, n), sizes = x_TN.shape, self.sizes
        padded, blocks = weight.padded_inputs, -(-weight.out_features // sizes.block)
        forms = weight.forms | sizes.int8
        best = rows * sizes.block * 8 + 64 + (rows * padded // sizes.chunk * 4 + 63) // 64 * 64
        plan = self._plan(rows, weight, best, (rows * blocks * 4 + 63) // 64 * 64, forms)
        self.rt.call(
            self.SCREENED, screen.numel() // 40, x=x_TN.data_ptr(), rows=rows, inputs=n, x_stride=x_TN.stride(0),
            segments=weight.segments.data_ptr(), kinds=forms, padded_inputs=padded, screen=screen.data_ptr(),
            token=token.data_ptr(), workspace=plan.space.data_ptr(), panel_rows=plan.panel, tile_bytes=plan.tile,
            best_bytes=best, alone=plan.alone, threads=plan.threads,
        )  # fmt: skip

    def linear_topk(
        self,
        x: Tensor,
        weight: PackedLinear,
        k: int,
        scale: Tensor | None = None,
        norms: int = 0,
        cap: float = 0.0,
        bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of each row of cap * tanh(x W^T / cap) (cap 0: of x W^T) the k largest, best first and the lowest id first
        of equals; and the log-sum-exp of the row times each of its scales. The rows themselves are not written.

        `scale` float32 `[T, norms]`; None: 1. Returns values `[T, k]`, ids int32 `[T, k]` and sums `[T, norms]`.
        A row of fewer than k numbers ends in -inf. Raises `ValueError` for a weight of several formats.
        """
        if weight.segments.shape[0] != 1 or weight.paired:
            raise ValueError("linear_topk takes a weight of one part")
        x_TN, rows, n = self._input(x, weight)
        if scale is not None and (scale.shape != (rows, norms) or not scale.is_contiguous()):
            raise ValueError(f"scale must be contiguous [{rows}, {norms}], not {list(scale.shape)}")
        values, ids = self.rt.empty((rows, k)), self.rt.empty((rows, k), torch.int32)
        sums = self.rt.empty((rows, norms))
        capacity = 2 * k + 64
        row_bytes = (capacity * 8 + 16 + 63) // 64 * 64
        chunks = -(-weight.out_features // self.sizes.top_columns)
        panel = min(rows, TOP_ROWS)
        states = panel * norms * chunks * self.sizes.top_state
        plan = self._plan(rows, weight, panel * row_bytes, states)
        self.rt.call(
            self.TOPK, self._work(rows, weight), x=x_TN.data_ptr(), rows=rows, inputs=n, x_stride=x_TN.stride(0),
            segments=weight.segments.data_ptr(), kinds=weight.forms, padded_inputs=weight.padded_inputs,
            bias=self._bias(bias, weight), cap=cap, scale=_pointer(scale), norms=norms, k=k, values=values.data_ptr(),
            ids=ids.data_ptr(), lse=sums.data_ptr(), capacity=capacity, row_bytes=row_bytes,
            workspace=plan.space.data_ptr(), panel_rows=min(panel, plan.panel), tile_bytes=plan.tile,
            alone=plan.alone, threads=plan.threads,
        )  # fmt: skip
        return values, ids, sums

    def _input(self, x: Tensor, weight: PackedLinear) -> tuple[Tensor, int, int]:
        if x.shape[-1] != weight.in_features:
            raise ValueError(f"the weight takes {weight.in_features} inputs, not {x.shape[-1]}")
        x_TN = rows_of(x)
        return x_TN, x_TN.shape[0], x_TN.shape[1]

    def _bias(self, bias: Tensor | None, weight: PackedLinear) -> int | None:
        if bias is None:
            return None
        if weight.bias is None or weight.bias[0] is not bias:
            with _disable_current_modes():  # a recording refuses torch ops; this one is done once
                weight.bias = (bias, bias.float().contiguous())
        return weight.bias[1].data_ptr()

    def _plan(self, rows: int, weight: PackedLinear, extra: int = 0, shared: int = 0, forms: int = 0) -> _Plan:
        """`extra`: more workspace bytes per thread; `shared`: for all of them together."""
        padded, threads, forms = weight.padded_inputs, self.rt.library.threads(), forms or weight.forms
        row, tile = self.sizes.row_bytes(padded, forms), self.sizes.tile_bytes(padded)
        panel = min(rows, max(48, min(512, PANEL_BYTES // row)))
        alone = rows == 1  # from two on, preparing all of them for itself takes a thread longer than a barrier
        size = threads * (tile + extra) + shared + row * (threads * rows if alone else 2 * panel)
        return _Plan(panel, tile, int(alone), threads, self.workspace.take(size, self.rt))

    def _work(self, rows: int, weight: PackedLinear) -> int:
        return weight.nbytes // 40 + rows * weight.out_features * weight.in_features // 400


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _stride(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.stride(0)


def _runs(read: list[_Part], sizes: list[int], block: int) -> list[list[int]]:
    """Consecutive parts that can share one segment: one layout, and whole blocks but for the last."""
    groups: list[list[int]] = []
    for i, part in enumerate(read):
        joins = groups and read[groups[-1][-1]].layout == part.layout and sizes[groups[-1][-1]] % block == 0
        if joins:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def ops(native: NativeLinear) -> dict[str, Any]:
    """The table's entries."""
    names = ["prepare_linear", "linear", "embedding", "linear_argmax", "linear_topk"]
    names += ["embedding_part"] if native.parts else []
    return {name: getattr(native, name) for name in names}
