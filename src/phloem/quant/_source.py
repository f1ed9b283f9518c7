"""A tensor of a checkpoint that has not been read, and the part of one that a layer wants.

`Source` is a stored tensor; `take` reads what is asked of it and no more. `View` is one matrix or vector as a layer
sees it: an expert of a stacked tensor, the k rows of a fused one, this rank's columns. Op tables are given views.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Sequence
    from concurrent.futures import Executor
    from pathlib import Path

    from torch import Tensor

    from phloem.kernels.narrow import Codes, Narrow

LARGEST = 1e18  # of a weight: no training gives it, and the norm behind it could not square it in float32
Index = tuple[int | slice, ...]  # one entry per axis of the stored tensor; slices have start, stop and step


def out_of_range(values: Tensor, most: float = LARGEST) -> bool:
    """Whether some of a float tensor's numbers are none (NaN), infinite, or beyond what weights are. In one pass."""
    if not values.numel():
        return False
    low, high = torch.aminmax(values if values.itemsize > 1 else values.float())
    return not -most <= float(low) <= float(high) <= most  # NaN is neither


class Stager(Protocol):
    """Brings a part of a file onto a device (`platforms._staging`)."""

    def load(
        self, path: Path, offset: int, shape: tuple[int, ...], stored: torch.dtype, index: Index | None, to: torch.dtype
    ) -> Tensor: ...


@dataclass
class Source:
    """One stored tensor. `shifted`: the layer's shift (`Weight.shift`) is in the values already. `turned`: as a layer
    counts, the stored shape is [..., in_features, out_features]; rows are out_features."""

    name: str
    shape: tuple[int, ...]  # as stored
    kind: str = "dense"
    shifted: bool = False
    workers: Executor | None = None  # to dequantise with
    turned: bool = field(default=False, kw_only=True)
    bytes_read: int = field(default=0, init=False)  # what `take` and `take_raw` have taken from the file

    @property
    def dtype(self) -> torch.dtype:
        """The type that it is stored in, where that is one of torch's."""
        raise NotImplementedError

    def stored_values(self) -> Tensor | None:
        """All of it as it is stored, where it lies; None: not as floats of 16 bits or more."""
        return None

    def take(self, index: Index | None, dtype: torch.dtype) -> Tensor:
        """The entries `index` (None: all) as a contiguous tensor on the CPU, or where the model is."""
        raise NotImplementedError

    def take_raw(self, rows: slice, cols: slice) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """Stored bytes `[rows, bytes per row]` of a quantised matrix, of columns that `has_raw`."""
        raise TypeError(f"{self.name} is dense: it has no quantised bytes")

    def has_raw(self, cols: slice) -> bool:
        """Whether these columns begin and end with blocks of the stored format."""
        return False

    def narrow(self, rows: slice, cols: slice) -> Narrow | str:
        """What kernels for narrow weights can be given of these rows and columns, or why not; "": it is plain."""
        del rows, cols
        return ""

    def codes(self, rows: slice, cols: slice, entry: int = 0) -> Codes:
        """What `narrow` has promised; of an entry of a stack."""
        raise TypeError(f"{self.name} is plain: it has no codes")

    def refused(self, why: str) -> None:
        """The op table takes it unpacked all the same."""

    def done(self) -> None:
        """What was kept for the next read may go."""


@dataclass
class View:
    """What a layer wants of a source: a `kernels.ops.WeightSource`.

    `index` None: all of it. Otherwise the stored tensor's entries, to be transposed if it is stored so.
    """

    name: str
    shape: tuple[int, ...]  # as the layer has it, on this rank
    source: Source
    index: Index | None = None
    transposed: bool = False
    kind: str = field(default="dense", init=False)  # as the source's, where its bytes can be had

    def __post_init__(self) -> None:
        if self._matrix() is not None:
            self.kind = self.source.kind

    @property
    def shifted(self) -> bool:
        return self.source.shifted

    @property
    def workers(self) -> Executor | None:
        return self.source.workers

    def dense(self, dtype: torch.dtype) -> Tensor:
        values = self.source.take(self.index, dtype)
        return (values.T if self.transposed else values).reshape(self.shape).contiguous()

    def raw(self) -> np.ndarray[Any, np.dtype[np.uint8]]:
        matrix = self._matrix()
        if matrix is None:
            raise TypeError(f"{self.name} is dense: it has no quantised bytes")
        return self.source.take_raw(*matrix)

    def narrow(self) -> Narrow | str:
        """What kernels for narrow weights can be given, or why not; "": it is plain."""
        place = self._place()
        return "" if place is None else self.source.narrow(*place[:2])

    def codes(self) -> Codes:
        """What `narrow` has promised."""
        place = self._place()
        if place is None:
            raise TypeError(f"{self.name} is plain: it has no codes")
        return self.source.codes(*place)

    def refused(self, why: str) -> None:
        """The op table takes it unpacked all the same."""
        self.source.refused(why)

    def _matrix(self) -> tuple[slice, slice] | None:
        """Rows and columns, where they can be had as stored bytes."""
        span = None if self.source.kind == "dense" else self._span()
        return span if span is not None and self.source.has_raw(span[1]) else None

    def _place(self) -> tuple[slice, slice, int] | None:
        """Rows and columns, and the entry of a stack that they lie in."""
        if (span := self._span()) is not None:
            return *span, 0
        if self.index is None or len(self.index) != 3 or self.transposed != self.source.turned:
            return None
        entry, *axes = self.index
        cols, rows = axes if self.transposed else reversed(axes)
        if not isinstance(entry, int) or not isinstance(rows, slice) or not isinstance(cols, slice):
            return None
        return rows, cols, entry

    def _span(self) -> tuple[slice, slice] | None:
        """Rows and columns; None: it is no matrix, or stored transposed."""
        index = everything(self.source.shape) if self.index is None else self.index
        if self.transposed or len(index) != 2:
            return None
        rows, cols = index
        return (rows, cols) if isinstance(rows, slice) and isinstance(cols, slice) else None


def indexed(values: Tensor, index: Index | None) -> Tensor:
    """Entries of a tensor that is there."""
    return values if index is None else values[index]


def everything(shape: Sequence[int]) -> Index:
    return tuple(slice(0, size, 1) for size in shape)
