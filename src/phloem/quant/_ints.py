"""Integers of few bits with a scale, and perhaps a zero point, per output and group, as AWQ, GPTQ and others store."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from phloem.kernels.narrow import Narrow
from phloem.quant._grid import Grid, Opened, groups_of, kind_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from phloem.quant._report import Report


@dataclass
class Ints:
    """How one matrix of integers [M, N] is read.

    `codes`: rows and columns that were asked for -> a function that unpacks some of those rows, uint8 or int8 [n, C].
    `scales`, `zeros`: rows and groups -> float32 [R, G]; R may be 1. `base`: the zero point where it is one for all.
    """

    bits: int
    codes: Callable[[slice, slice], Callable[[slice], Tensor]]
    scales: Callable[[slice, slice], Tensor]
    zeros: Callable[[slice, slice], Tensor] | None
    base: int
    width: int  # columns of a group; 0: all
    order: Tensor | None = None  # int64 [N]: each column's group, where groups are no runs of columns

    def matrix(self, name: str, shape: tuple[int, int], report: Report) -> Grid:
        """The matrix; rows of it can be had as bytes of a GGUF type where groups are runs and scales fit."""
        rows, columns = shape
        if self.order is not None:
            kind, why = "dense", "act-order: its groups are no runs of columns (--quantization int4 makes some)"
        else:
            whole = slice(0, rows, 1), slice(0, columns // (self.width or columns), 1)
            kind, why = kind_of(self.bits, self.zeros is None, [self.scales(*whole)], self.width, columns)
        fits, zeros = kind != "dense", self.zeros is not None
        form = Narrow("int4", 1, self.width or columns, zeros) if fits and self.bits <= 4 else None
        if self.bits > 4 and self.order is None:
            form = Narrow("int8", 1, self.width or columns, zeros, half=fits)
        return Grid(name, shape, kind, open=self._opener(columns), report=report, why=why, form=form)

    def _opener(self, columns: int) -> Callable[[int, slice, slice], Opened]:
        def open_(entry: int, rows: slice, cols: slice) -> Opened:
            del entry
            if self.order is None:
                group, span = groups_of(cols, self.width, columns)
            else:
                group, span = self.order[cols], slice(0, columns // (self.width or columns), 1)
            unpacked = self.codes(rows, cols)

            def codes(piece: slice) -> Tensor:
                found = unpacked(piece)
                signed = self.zeros is None and found.dtype != torch.int8
                return (found.to(torch.int16) - self.base).to(torch.int8) if signed else found

            zeros = None if self.zeros is None else self.zeros(rows, span)
            return Opened(codes, self.scales(rows, span), group, zeros)

        return open_
