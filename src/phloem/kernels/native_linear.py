"""Linear layers and embeddings over packed weights: quantised checkpoints stay quantised, in the layouts of
csrc/cpu/linear/layout.h.

Activations are quantised as they come: int8 with one scale per 32 inputs for integer weights, bfloat16 for bfloat16
weights, float32 for the rest. Where more than 24 rows are multiplied at once (with AVX-512), integer weights of fewer
than 8 bits are taken as bytes with one scale per output feature and 128 or 64 inputs, and 64 inputs of a row may have
one scale (csrc/cpu/linear/bytes.h), unless `exact`: then a row's result does not depend on the rows beside it. It never
depends on the number of threads. `exact` also reads heads whole, of which `linear_argmax` otherwise reads most in four
bits (_native_screen.py).

Legend: T rows, N inputs, M outputs.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from phloem.core.errors import ModelLoadError
from phloem.kernels._native_basic import norm_weight, rows_of
from phloem.kernels._native_basic import ops as basic_ops
from phloem.kernels._native_screen import Screens
from phloem.utils.memory import zeros

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from phloem.kernels._native_runtime import Runtime
    from phloem.kernels.calls import WeightSource

# Layout numbers of csrc/cpu/linear/layout.h, with the bytes and weights of a GGUF block.
BLOCKS = {
    "Q4_0": (0, 18, 32), "Q4_1": (1, 20, 32), "Q5_0": (2, 22, 32), "Q5_1": (3, 24, 32), "Q8_0": (4, 34, 32),
    "Q2_K": (5, 84, 256), "Q3_K": (6, 110, 256), "Q4_K": (7, 144, 256), "Q5_K": (8, 176, 256), "Q6_K": (9, 210, 256),
    "IQ4_NL": (10, 18, 32),
}  # fmt: skip
FLOATS = {"BF16": (11, torch.bfloat16), "F16": (12, torch.float16), "F32": (13, torch.float32)}
LAYOUT_OF = {dtype: (layout, name) for name, (layout, dtype) in FLOATS.items()}
BLOCK = 16  # output features per packed block
INT8, HALF, SINGLE = 1, 2, 4  # forms of the activations
SPLIT = 14  # Q8_0 whose upper and lower halves of bytes lie apart, for weights as tall as a vocabulary
TALL = 16384
EXACT = 8  # beside them: weights keep their own form however many rows there are
ACTIVATIONS = {"": 0, "silu": 1, "gelu_tanh": 2}
TILE_CHUNK = 768  # workspace of one unpacked block per 32 inputs, at most
PANEL_BYTES = 1 << 20  # activations of one panel of rows, at most: about a second-level cache
SLAB = 32 << 20
TOP_ROWS = 64  # rows of a panel of linear_topk: their candidates and sums stay in a second-level cache
TOP_CHUNK = 512  # columns whose exponentials linear_topk adds together


@dataclass(slots=True, eq=False)
class PackedLinear:
    """The weight of a (fused) linear layer as the kernels read it. Made by `prepare_linear`."""

    in_features: int
    out_features: int
    padded_inputs: int
    kinds: tuple[str, ...]  # format of each part, as the checkpoint has it: "Q4_1", "BF16", ...
    forms: int  # bits: INT8, HALF, SINGLE, EXACT
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

    @property
    def form(self) -> int:
        return {11: HALF, 12: SINGLE, 13: SINGLE}.get(self.layout, INT8)


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


def _read(part: WeightSource, dtype: torch.dtype) -> _Part:
    """A part's bytes, as stored where there is a layout for them, else dense in `dtype`."""
    out_features, in_features = part.shape
    kind = part.kind
    if kind not in BLOCKS and kind not in FLOATS:
        tensor = part.dense(dtype if dtype in LAYOUT_OF else torch.float32).contiguous()
        layout, kind = LAYOUT_OF[tensor.dtype]
        return _Part(tensor.view(torch.uint8).reshape(out_features, -1), layout, kind)
    raw = part.raw()
    if kind in FLOATS:
        layout, row_bytes = FLOATS[kind][0], in_features * FLOATS[kind][1].itemsize
    else:
        layout, block_bytes, block = BLOCKS[kind]
        row_bytes = -(-in_features // block) * block_bytes
    if raw.shape != (out_features, row_bytes):
        raise ModelLoadError(
            f"{part.name}: {kind} data of shape {tuple(raw.shape)} do not fit a weight of shape {tuple(part.shape)}, "
            f"which takes [{out_features}, {row_bytes}] bytes"
        )
    return _Part(_as_tensor(raw), layout, kind)


def _as_tensor(raw: Any) -> Tensor:
    """A tensor over an array's memory, which may be a read-only mapping (nothing here writes to it)."""
    import warnings

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not writable.*")
        tensor = torch.from_numpy(raw)
    return tensor if tensor.is_contiguous() else tensor.contiguous()


class NativeLinear:
    """The linear ops over one runtime. `prepare_linear`, `linear` and `embedding` are the table's; the others are
    fused forms of what the table does in several ops."""

    def __init__(self, rt: Runtime, *, exact: bool = False) -> None:
        self.rt = rt
        self.exact = exact
        self.store = _Store()
        basic = basic_ops(rt)
        self.gates = {"silu": basic["silu_and_mul"], "gelu_tanh": basic["gelu_tanh_and_mul"]}
        self.workspace = _Workspace()
        self.LINEAR, self.ARGMAX, self.ROWS = rt.op("linear"), rt.op("linear_argmax"), rt.op("linear_rows")
        self.TOPK, self.SCREENED = rt.op("linear_topk"), rt.op("linear_argmax_screened")
        self.screens = Screens(rt)
        self.PACK, self.PACK_DENSE = rt.op("linear_pack"), rt.op("linear_pack_dense")
        geometry = torch.empty(15, 2, dtype=torch.int64)
        rt.call(rt.op("linear_geometry"), 0, geometry.data_ptr())
        self.geometry: list[list[int]] = geometry.tolist()  # per layout: inputs and bytes of a unit

    # ---- weights ----

    def prepare_linear(self, parts: Sequence[WeightSource], dtype: torch.dtype, device: torch.device) -> PackedLinear:
        """Packs the parts of one fused layer, stacked along out_features. Raises `ModelLoadError` for data that do
        not fit their shape."""
        read = [_read(part, dtype) for part in parts]
        if len(parts) == 1 and parts[0].shape[0] >= TALL and read[0].kind == "Q8_0" and not self.exact:
            read[0].layout = SPLIT
        in_features = parts[0].shape[1]
        for part in parts:
            if part.shape[1] != in_features:
                raise ModelLoadError(f"{part.name}: {part.shape[1]} inputs, but {parts[0].name} has {in_features}")
        unit = 256 if any(part.kind.endswith("_K") for part in read) else 64
        padded = -(-in_features // unit) * unit
        sizes = [part.shape[0] for part in parts]
        paired = len(read) == 2 and read[0].layout == read[1].layout and sizes[0] == sizes[1] and sizes[0] % BLOCK == 0
        segments: list[list[int]] = []
        memory: list[Tensor] = []
        column = 0
        for group in [[0, 1]] if paired else _runs(read, sizes):
            blocks = sum(-(-sizes[i] // BLOCK) for i in group)
            data = self.store.take(blocks * self._block_bytes(read[group[0]].layout, padded))
            first = 0
            for turn, i in enumerate(group):
                self._pack(read[i], sizes[i], data, padded, turn if paired else first, 2 if paired else 1)
                first += -(-sizes[i] // BLOCK)
            features = sum(sizes[i] for i in group)
            half = sizes[0] if paired else 0
            segments.append([data.data_ptr(), read[group[0]].layout, blocks, features, column, half])
            memory.append(data)
            column += features
        forms = EXACT if self.exact else 0
        for part in read:
            forms |= part.form
        return PackedLinear(
            in_features, column, padded, tuple(part.kind for part in read), forms, paired,
            sum(data.numel() for data in memory), dtype, torch.tensor(segments), memory, self,
            split=read[0].layout == SPLIT,
        )  # fmt: skip

    def _block_bytes(self, layout: int, padded: int) -> int:
        inputs, size = self.geometry[layout]
        return padded // inputs * size

    def _pack(self, part: _Part, rows: int, target: Tensor, padded: int, first: int, step: int) -> None:
        self.rt.call(
            self.PACK_DENSE if part.kind in FLOATS else self.PACK, part.data.numel(),
            part.data.data_ptr(), target.data_ptr(), rows, part.data.shape[1], part.layout,
            padded // self.geometry[part.layout][0], first, step,
        )  # fmt: skip

    # ---- the table's ops ----

    def linear(self, x: Tensor, weight: PackedLinear, bias: Tensor | None) -> Tensor:
        """x[T, N] -> [T, M]."""
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
            self.ROWS, count * n,
            ids.data_ptr(), weight.segments.data_ptr(), out.data_ptr(), count, n, weight.padded_inputs,
            weight.segments.shape[0], n, scale,
        )  # fmt: skip
        return out

    # ---- fused forms ----

    def gated_linear(self, x: Tensor, weight: PackedLinear, bias: Tensor | None, activation: str) -> Tensor:
        """x[T, N] -> activation(gate) * up [T, M / 2]: one op where gate and up have one format."""
        if weight.paired:
            return self.fused(x, weight, bias, activation=activation)[0]
        return self.gates[activation](self.linear(x, weight, bias))

    def norm_linear(
        self,
        x: Tensor,
        residual: Tensor | None,
        norm: Tensor,
        eps: float,
        weight: PackedLinear,
        bias: Tensor | None,
        activation: str,
    ) -> tuple[Tensor, Tensor]:
        """(linear or gated linear of norm(x + residual), x + residual): rows are normalised as they are quantised."""
        inside = activation if weight.paired else ""
        out, total = self.fused(x, weight, bias, addend=residual, norm=norm, eps=eps, activation=inside)
        if activation and not inside:
            out = self.gates[activation](out)
        return out, x if total is None else total

    def linear_add(
        self, x: Tensor, weight: PackedLinear, bias: Tensor | None, residual: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """(x W^T + bias + residual, None) for one row: each thread adds where it has just written. For more rows
        (x W^T + bias, residual): adding column by column is slower than by the norm, which reads whole rows."""
        if x.shape[0] == 1:
            return self.fused(x, weight, bias, residual=residual)[0], None
        return self.linear(x, weight, bias), residual

    def fused(
        self,
        x: Tensor,
        weight: PackedLinear,
        bias: Tensor | None = None,
        *,
        addend: Tensor | None = None,
        norm: Tensor | None = None,
        eps: float = 0.0,
        activation: str = "",
        residual: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """activation(norm(x + addend) W^T + bias) + residual, and x + addend (None without addend).

        `norm` is the weight of an RMS norm. `activation` "silu" or "gelu_tanh" multiplies the activated first half of
        the outputs (gate) with the second (up) and needs `weight.paired`.
        """
        x_TN, rows, n = self._input(x, weight)
        columns = weight.out_features
        if activation:
            if not weight.paired:
                raise ValueError("a gated activation needs a weight of two equal parts")
            columns //= 2
        norm_data = None if norm is None else norm_weight(norm, n)
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
            x_TN.data_ptr(), _pointer(add_TN), norm_data, _pointer(total),
            weight.segments.data_ptr(), self._bias(bias, weight), _pointer(res_TM),
            out.data_ptr(), plan.space.data_ptr(),
            rows, n, x_TN.stride(0), _stride(add_TN), n, columns, _stride(res_TM),
            weight.segments.shape[0], weight.forms, weight.padded_inputs, plan.panel, plan.tile, plan.alone,
            plan.threads, ACTIVATIONS[activation], eps,
        )  # fmt: skip
        return out, total

    def linear_argmax(self, x: Tensor, weight: PackedLinear, bias: Tensor | None = None) -> Tensor:
        """The first largest of each row of x W^T, int32 [T], without the row."""
        x_TN, rows, n = self._input(x, weight)
        token = self.rt.empty((rows,), torch.int32)
        screen = None if self.exact or bias is not None else self.screens.of(weight, rows)
        if screen is not None:
            self._screened(x_TN, weight, screen, token)
            return token
        best = min(rows, 512) * BLOCK * 8
        plan = self._plan(rows, weight, best)
        self.rt.call(
            self.ARGMAX, self._work(rows, weight),
            x_TN.data_ptr(), None, None, None, weight.segments.data_ptr(), self._bias(bias, weight),
            token.data_ptr(), None, plan.space.data_ptr(),
            rows, n, x_TN.stride(0), 0, 0,
            weight.segments.shape[0], weight.forms, weight.padded_inputs, plan.panel, plan.tile, best, plan.alone,
            plan.threads, 0.0,
        )  # fmt: skip
        return token

    def _screened(self, x_TN: Tensor, weight: PackedLinear, screen: Tensor, token: Tensor) -> None:
        rows, n = x_TN.shape
        padded, blocks = weight.padded_inputs, -(-weight.out_features // BLOCK)
        forms = weight.forms | INT8
        best = rows * BLOCK * 8 + 64 + (rows * padded // 32 * 4 + 63) // 64 * 64
        plan = self._plan(rows, weight, best, (rows * blocks * 4 + 63) // 64 * 64, forms)
        self.rt.call(
            self.SCREENED, screen.numel() // 40,
            x_TN.data_ptr(), weight.segments.data_ptr(), screen.data_ptr(), token.data_ptr(), plan.space.data_ptr(),
            rows, n, x_TN.stride(0), forms, padded, plan.panel, plan.tile, best, plan.alone, plan.threads,
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
        chunks = -(-weight.out_features // TOP_CHUNK)
        panel = min(rows, TOP_ROWS)
        states = panel * norms * chunks * 128
        plan = self._plan(rows, weight, panel * row_bytes, states)
        self.rt.call(
            self.TOPK, self._work(rows, weight),
            x_TN.data_ptr(), weight.segments.data_ptr(), self._bias(bias, weight), _pointer(scale),
            values.data_ptr(), ids.data_ptr(), sums.data_ptr(), plan.space.data_ptr(),
            rows, n, x_TN.stride(0), weight.forms, weight.padded_inputs, min(panel, plan.panel), plan.tile, plan.alone,
            plan.threads, k, norms, capacity, row_bytes, cap,
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
        row = ((padded // 32) | 1) * 64 if forms & INT8 else 0
        row += padded * 2 + 64 if forms & HALF else 0
        row += padded * 4 + 64 if forms & SINGLE else 0
        panel = min(rows, max(48, min(512, PANEL_BYTES // row)))
        tile = 2 * (padded // 32 * TILE_CHUNK + 64)
        alone = rows == 1  # from two on, preparing all of them for itself takes a thread longer than a barrier
        size = threads * (tile + extra) + shared + row * (threads * rows if alone else 2 * panel)
        return _Plan(panel, tile, int(alone), threads, self.workspace.take(size, self.rt))

    def _work(self, rows: int, weight: PackedLinear) -> int:
        return weight.nbytes // 40 + rows * weight.out_features * weight.in_features // 400


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _stride(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.stride(0)


def _runs(read: list[_Part], sizes: list[int]) -> list[list[int]]:
    """Consecutive parts that can share one segment: one layout, and whole blocks but for the last."""
    groups: list[list[int]] = []
    for i, part in enumerate(read):
        joins = groups and read[groups[-1][-1]].layout == part.layout and sizes[groups[-1][-1]] % BLOCK == 0
        if joins:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def ops(native: NativeLinear) -> dict[str, Any]:
    """The table's entries."""
    names = ["prepare_linear", "linear", "embedding", "gated_linear", "linear_argmax", "linear_topk"]
    return {name: getattr(native, name) for name in [*names, "norm_linear", "linear_add"]}
