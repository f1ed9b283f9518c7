"""GPTQ checkpoints: 2 to 8 bits along the inputs, a scale and a zero point per group; groups may be out of order.

Kept packed as Q4_0, Q4_1 or Q8_0 rows, but for act-order (`g_idx`), whose matrices are unpacked. Zero points are stored
less 1 (`checkpoint_format` gptq) or as they are (gptq_v2). Files mistake the two: symmetric ones tell by their zeros.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from phloem.core.errors import ModelLoadError
from phloem.quant import Method, Report, beside
from phloem.quant._bits import fitting_bits, unpack, words_for
from phloem.quant._ints import Ints
from phloem.quant._stored import check_shape, need, plain, read, width_of
from phloem.utils import log

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from phloem.quant._source import Source

QUANT_METHODS = ("gptq",)
_PARTS = {"qweight": "qweight", "qzeros": "qzeros", "scales": "scales", "g_idx": "g_idx"}
_OFFSETS = {"gptq": 1, "gptq_v2": 0}
_log = log.get("quant")


def configure(config: Mapping[str, Any], report: Report) -> Method:
    layout = str(config.get("checkpoint_format") or "gptq")
    if layout not in _OFFSETS:
        raise ModelLoadError(f"GPTQ checkpoint_format {layout!r} is not read: convert it to {' or '.join(_OFFSETS)}")
    bits, symmetric = config.get("bits", 4), bool(config.get("sym", True))
    if bits not in (2, 3, 4, 5, 6, 7, 8):
        raise ModelLoadError(f"GPTQ with {bits!r} bits: 2 to 8 are known")
    if config.get("is_marlin_format"):
        raise ModelLoadError("GPTQ in Marlin's own order is not read: convert it to checkpoint_format gptq")
    told: set[str] = set()

    def join(name: str, found: Mapping[str, Source], shape: tuple[int, ...]) -> Source:
        whole = plain(name, found)
        if whole is not None:
            return whole
        reader = _Reader(name, found, (shape[0], shape[1]), int(bits))
        offset = reader.offset(_OFFSETS[layout], symmetric)
        if offset != _OFFSETS[layout] and not told:
            told.add(name)
            _log.warning("%s: zero points are not stored as checkpoint_format %s says; read as they are", name, layout)
        return reader.ints(offset).matrix(name, (shape[0], shape[1]), report)

    return Method("gptq", companions=lambda name: beside(name, _PARTS, weight=True), join=join, report=report)


class _Reader:
    """One matrix [M, N]: `qweight` [N b / 32, M], `qzeros` [G, M b / 32], `scales` [G, M], `g_idx` [N]."""

    def __init__(self, name: str, found: Mapping[str, Source], shape: tuple[int, int], bits: int) -> None:
        self.qweight, self.qzeros, self.scales = need(name, found, "qweight", "qzeros", "scales")
        rows, columns = shape
        self.rows, self.columns = shape
        self.bits = fitting_bits(self.qweight.shape[0], columns, (bits,), self.qweight.name)
        of = f"{name} {list(shape)} in {self.bits} bits"
        check_shape(self.qweight, (words_for(columns, self.bits), rows), of=of)
        groups = self.scales.shape[0]
        check_shape(self.scales, (groups, rows), of=of)
        check_shape(self.qzeros, (groups, words_for(rows, self.bits)), of=of)
        order = found.get("g_idx")
        self.order: Tensor | None = None
        if order is not None:
            check_shape(order, (columns,), of=of)
            self.order = read(order).long()
            if not bool(((self.order >= 0) & (self.order < groups)).all()):
                raise ModelLoadError(f"{order.name} names groups beyond the {groups} that there are")
        # The last group of a trained order may be shorter; in runs, all are alike.
        self.width = -(-columns // groups) if self.order is not None else width_of(name, columns, groups)
        if self.order is not None and torch.equal(self.order, torch.arange(columns) // self.width):
            self.order = None

    def stored_zeros(self) -> Tensor:
        """uint8 [G, M]."""
        return unpack(read(self.qzeros), self.bits, self.rows)

    def offset(self, said: int, symmetric: bool) -> int:
        """What is to be added to zero points: of a symmetric file, what makes them the middle."""
        zeros = self.stored_zeros()
        middle = 1 << self.bits - 1
        if symmetric:
            for offset in (said, 1 - said):
                if bool((zeros == middle - offset).all()):
                    return offset
        return said

    def ints(self, offset: int) -> Ints:
        middle = 1 << self.bits - 1
        constant = bool((self.stored_zeros() == middle - offset).all())

        def codes(rows: slice, cols: slice) -> Callable[[slice], Tensor]:
            per = 32 // self.bits if 32 % self.bits == 0 else 32
            words = words_for(per, self.bits)
            first = cols.start // per
            span = slice(first * words, -(-cols.stop // per) * words, 1)
            words_WR = read(self.qweight, span, rows)
            skip = cols.start - first * per

            def some(piece: slice) -> Tensor:
                return unpack(words_WR[:, piece].T, self.bits, skip + cols.stop - cols.start)[:, skip:]

            return some

        def zeros(rows: slice, groups: slice) -> Tensor:
            return self.stored_zeros()[groups, rows].T.float() + offset

        def scale(rows: slice, groups: slice) -> Tensor:
            return read(self.scales, groups, rows).T.float()

        return Ints(self.bits, codes, scale, None if constant else zeros, middle, self.width, self.order)


METHOD = Method("gptq", configure=configure)
