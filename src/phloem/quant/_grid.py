"""A matrix of few bits with scales: (code - zero) * scale, over groups of columns, read from several stored tensors.

Values are made in float32. Where groups and scales allow, its rows can be had as the bytes of a GGUF type, so that
every table that reads those keeps the matrix as small as it is. Legend: R rows, C columns, G groups.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from math import gcd
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from phloem.core.errors import ModelLoadError
from phloem.kernels.narrow import FLOAT4_GROUP, FLOAT8_BLOCK, MOST_POWER, Codes, Narrow, group_width
from phloem.quant._bits import e2m1_of
from phloem.quant._report import VALUES, Report
from phloem.quant._source import Index, Source, everything

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch import Tensor

BLOCK = 32  # columns of a block of the GGUF types below
HOST = torch.device("cpu")
_ELEMENTS_AT_ONCE = 1 << 18  # of a piece: its intermediates stay in a core's cache
_ELEMENTS_ON_DEVICE = 1 << 24  # fewer are launches that do too little, more take memory that the model needs
_ERROR = 2.0**-8  # of a scale in float16, beside the scale itself or, of small ones, beside the mean


@dataclass
class Opened:
    """Some rows and columns, read but not unpacked."""

    codes: Callable[[slice], Tensor]  # of some of these rows, [n, C]: integers or floats
    scale_RG: Tensor  # float32; R may be 1
    group_C: Tensor  # int64: each column's group
    zero_RG: Tensor | None = None  # float32; R may be 1; None: codes count from zero

    def values(self, piece: slice) -> Tensor:
        """float32 [n, C]."""
        codes = self.codes(piece).to(torch.float32, copy=True)
        scale, zero = _rows(self.scale_RG, piece), None if self.zero_RG is None else _rows(self.zero_RG, piece)
        width = codes.shape[1] // scale.shape[1]
        if width * scale.shape[1] == codes.shape[1] and self.even:  # whole groups: many times faster than a gather
            codes = codes.unflatten(1, (-1, width))
            codes = codes if zero is None else codes.sub_(zero.unsqueeze(-1))
            return codes.mul_(scale.unsqueeze(-1)).flatten(1)
        codes = codes if zero is None else codes - zero[:, self.group_C]
        return codes * scale[:, self.group_C]

    @cached_property
    def even(self) -> bool:
        """Whether the columns are whole groups, in order."""
        width = max(1, len(self.group_C) // self.scale_RG.shape[1])
        return torch.equal(self.group_C, torch.arange(len(self.group_C)) // width)

    def blocks(self, piece: slice, kind: str) -> Tensor:
        """The bytes of a GGUF type, uint8 [n, bytes]."""
        codes = self.codes(piece)
        blocks = codes.to(torch.int8 if codes.dtype == torch.int8 else torch.uint8).unflatten(1, (-1, BLOCK))
        groups = self.group_C[::BLOCK]
        scale = _rows(self.scale_RG, piece)[:, groups].unsqueeze(-1).expand(*blocks.shape[:2], 1)
        fields = [scale.half().contiguous().view(torch.uint8)]
        if kind == "Q4_1":
            least = torch.zeros_like(scale) if self.zero_RG is None else -scale * self._zeros(piece, groups)
            fields.append(least.half().contiguous().view(torch.uint8))
        if kind == "Q8_0":
            return torch.cat([*fields, blocks.view(torch.uint8)], -1).flatten(1)
        offset = {"Q4_0": 8, "Q4_1": 0, "Q5_0": 16}[kind]
        whole = (blocks + offset).to(torch.uint8)
        if kind == "Q5_0":
            bits = (whole >> 4).unflatten(-1, (4, 8))
            fields.append((bits << torch.arange(8, dtype=torch.uint8)).sum(-1).to(torch.uint8))
        fields.append(whole[..., :16] & 15 | whole[..., 16:] << 4)
        return torch.cat(fields, -1).flatten(1)

    def _zeros(self, piece: slice, groups: Tensor) -> Tensor:
        assert self.zero_RG is not None
        return _rows(self.zero_RG, piece)[:, groups].unsqueeze(-1)


def kept_as(form: Narrow) -> str:
    """How a report calls it."""
    if form.kind in ("int4", "int8"):
        return f"{form.kind[3]}-bit integers"
    if form.kind == "gguf":
        return form.stored
    if form.kind == "mxfp4":
        return "4-bit floats"
    return "float8 with scales of rows" if form.high == 1 else "float8 with scales of blocks"


def _rows(table: Tensor, piece: slice) -> Tensor:
    return table if table.shape[0] == 1 else table[piece]


@dataclass
class Grid(Source):
    """One such matrix, or a stack of them. `kind` is the GGUF type that its rows can be had as.

    `open`: (entry of a stack, rows, columns), slices of step 1 -> what is read of it.
    `form`: of the whole matrix, what kernels for narrow weights can be given of it; None: nothing.
    """

    open: Callable[[int, slice, slice], Opened] = field(kw_only=True)
    report: Report | None = None
    why: str = ""  # why no table can keep it as it is
    form: Narrow | None = None
    _refused: str = field(default="", init=False)  # by the table that is served

    def take(self, index: Index | None, dtype: torch.dtype) -> Tensor:
        *entry, first, second = everything(self.shape) if index is None else index
        if entry and not isinstance(entry[0], int):
            assert isinstance(entry[0], slice)
            entries = range(*entry[0].indices(self.shape[0]))
            return torch.stack([self.take((number, first, second), dtype) for number in entries])
        rows, cols = (second, first) if self.turned else (first, second)
        if not isinstance(rows, slice) or not isinstance(cols, slice):
            raise ModelLoadError(f"{self.name}: {list(self.shape)} is a matrix, of which no single row is read")
        run = slice(rows.start, rows.stop, 1)
        opened = self.open(int(entry[0]) if entry and isinstance(entry[0], int) else 0, run, cols)  # type: ignore[arg-type]
        size = rows.stop - rows.start, cols.stop - cols.start
        out = torch.empty(size, dtype=dtype, device=opened.scale_RG.device)

        def fill(piece: slice) -> None:
            out[piece] = opened.values(piece).to(dtype)

        self._each(fill, *size, out.device)
        if self.report is not None:
            self.report.unpacked(self.name, self._refused or self.why or VALUES)
        out = out[:: rows.step]
        return (out.T if self.turned else out).contiguous()

    def has_raw(self, cols: slice) -> bool:
        return cols.step == 1 and cols.start % BLOCK == 0 and cols.stop % BLOCK == 0

    def take_raw(self, rows: slice, cols: slice) -> np.ndarray[Any, np.dtype[np.uint8]]:
        opened = self.open(0, slice(rows.start, rows.stop, 1), cols)
        made: dict[int, Tensor] = {}

        def fill(piece: slice) -> None:
            made[piece.start] = opened.blocks(piece, self.kind)

        self._each(fill, rows.stop - rows.start, cols.stop - cols.start, opened.scale_RG.device)
        if self.report is not None:
            self.report.kept(self.name, self.kind)
        return torch.cat([made[start] for start in sorted(made)])[:: rows.step].contiguous().numpy()

    def narrow(self, rows: slice, cols: slice) -> Narrow | str:
        form = self.form
        if form is None:
            return self.why or VALUES
        if form.kind == "mxfp4":
            whole = cols.step == 1 and not (cols.start % FLOAT4_GROUP or cols.stop % FLOAT4_GROUP)
            return form if whole else f"groups of {FLOAT4_GROUP} columns do not end where a rank's share does"
        if form.kind == "int4":
            width = group_width(form.wide, cols)
            if cols.step == 1 and width:
                return Narrow("int4", 1, width, form.zeros)
            return f"no power of two from 32 up divides groups of {form.wide} columns, or a rank's share of them"
        if form.kind == "int8":
            whole = form.wide == self.shape[1]
            return replace(form, wide=cols.stop - cols.start if whole else gcd(form.wide, cols.start, cols.stop))
        if form.high == 1:
            return Narrow("float8", 1, cols.stop - cols.start)
        whole = all(span.step == 1 and not span.start % FLOAT8_BLOCK for span in (rows, cols))
        return Narrow("float8", FLOAT8_BLOCK, FLOAT8_BLOCK) if whole else "a share of it begins inside a block"

    def codes(self, rows: slice, cols: slice, entry: int = 0) -> Codes:
        found = self.narrow(rows, cols)
        assert isinstance(found, Narrow)
        opened = self.open(entry, slice(rows.start, rows.stop, 1), cols)
        size = rows.stop - rows.start, cols.stop - cols.start
        eight, floats = found.kind == "float8", found.kind == "mxfp4"
        scale, zero = opened.scale_RG, opened.zero_RG
        values = torch.empty(size, dtype=torch.float8_e4m3fn if eight else torch.uint8, device=scale.device)
        signed = opened.codes(slice(0, 1)).dtype == torch.int8
        middle = 0 if eight or floats or not signed else 8 if found.kind == "int4" else 128
        zero = zero if zero is None or not middle else zero + middle

        def fill(piece: slice) -> None:
            read = opened.codes(piece)
            read = e2m1_of(read) if floats else read
            values[piece] = read if not middle else (read.to(torch.int16) + middle).to(torch.uint8)

        self._each(fill, *size, values.device)
        scale = scale * 2 if floats else scale  # of twice their values
        if floats and not bool((scale <= 2.0**MOST_POWER).all()):
            raise ModelLoadError(f"{self.name}: scales of its 4-bit floats are no numbers, or beyond 2^{MOST_POWER}")
        groups = opened.group_C[:: found.wide]
        scale = scale[:, groups].expand(size[0], -1)[:: rows.step * found.high]
        zero = None if zero is None else zero[:, groups].expand(size[0], -1)[:: rows.step]
        if self.report is not None:
            self.report.kept(self.name, kept_as(found))
        return Codes(values[:: rows.step], scale, zero)

    def refused(self, why: str) -> None:
        self._refused = why

    def _each(self, work: Callable[[slice], None], rows: int, cols: int, device: torch.device) -> None:
        """`work` for some rows at a time, on the host by the loader's workers if there are any."""
        host = device == HOST
        step = max(1, (_ELEMENTS_AT_ONCE if host else _ELEMENTS_ON_DEVICE) // max(1, cols))
        pieces = [slice(start, min(rows, start + step)) for start in range(0, rows, step)]
        done: Iterable[None] = (self.workers.map if self.workers and host else map)(work, pieces)
        list(done)


def groups_of(cols: slice, width: int, total: int) -> tuple[Tensor, slice]:
    """Each column's group, counted from the first that is read, and which groups these are; `width` 0: one group.

    `total`: columns of the whole matrix.
    """
    width = width or total
    first, last = cols.start // width, -(-cols.stop // width)
    return torch.arange(cols.start, cols.stop) // width - first, slice(first, last, 1)


def kind_of(bits: int, constant: bool, scales: Iterable[Tensor], width: int, columns: int) -> tuple[str, str]:
    """(The GGUF type that holds integers of so many bits, ""), or ("dense", why there is none).

    Args:
        constant: codes are signed, and count from zero.
        scales: all of them, float32.
        width: columns of a group; 0: all of them.
    """
    if columns % BLOCK or width % BLOCK:
        return "dense", f"groups of {width or columns} columns are not whole blocks of {BLOCK}"
    if bits > 4 and not constant:
        return "dense", f"{bits} bits with zero points have no packed rows"
    for scale in scales:
        error, size = (scale.half().float() - scale).abs(), scale.abs()
        if not bool((error <= _ERROR * size.clamp_min(size.mean())).all()):
            return "dense", "its scales do not fit into float16"
    return ("Q4_0" if constant else "Q4_1") if bits <= 4 else "Q8_0", ""
