"""bitsandbytes checkpoints: 4 bits over a table of 16 values (nf4, fp4) in blocks of the flat matrix, or 8 bits by row.

The 8-bit ones are kept packed, as Q8_0 rows. The 4-bit ones are unpacked: their values are no steps of one size.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from phloem.core.errors import ModelLoadError
from phloem.quant import Method, Report, beside
from phloem.quant._grid import Grid, Opened
from phloem.quant._ints import Ints
from phloem.quant._stored import check_shape, need, plain, read

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from phloem.quant._source import Source

QUANT_METHODS = ("bitsandbytes",)
_TABLES = ("nf4", "fp4")
_PARTS = {
    **{what: f"weight.{what}" for what in ("absmax", "quant_map", "nested_absmax", "nested_quant_map")},
    **{table: f"weight.quant_state.bitsandbytes__{table}" for table in _TABLES},
    "SCB": "SCB",
    "weight_format": "weight_format",
}
_NESTED = 256  # scales that share one of their own
_WHY = "the values of 4-bit tables are no steps of one size (--quantization int4 makes some)"


def configure(config: Mapping[str, Any], report: Report) -> Method:
    del config

    def join(name: str, found: Mapping[str, Source], shape: tuple[int, ...]) -> Source:
        # Which of the two stands beside a matrix decides, not the configuration.
        rest = {what: source for what, source in found.items() if what != "weight_format"}
        whole = plain(name, rest)
        if whole is not None:
            return whole
        size = shape[0], shape[1]
        return _by_row(name, found, size, report) if "SCB" in found else _by_table(name, found, size, report)

    return Method("bitsandbytes", companions=lambda name: beside(name, _PARTS, weight=True), join=join, report=report)


def _by_row(name: str, found: Mapping[str, Source], shape: tuple[int, int], report: Report) -> Grid:
    """int8 [M, N] with `SCB` [M]: 127 times each row's step."""
    weight, peak = need(name, found, "weight", "SCB")
    check_shape(weight, shape, of=name)
    check_shape(peak, (shape[0],), of=f"{name} {list(shape)}")
    order = found.get("weight_format")
    if order is not None and int(read(order).reshape(-1)[0]) != 0:
        raise ModelLoadError(f"{order.name}: weights are in another order than by row: save the model again")

    def scales(rows: slice, groups: slice) -> Tensor:
        del groups
        return read(peak, rows).float().unsqueeze(1) / 127

    def codes(rows: slice, cols: slice) -> Any:
        values = read(weight, rows, cols)
        return lambda piece: values[piece]

    return Ints(8, codes, scales, None, 0, 0).matrix(name, shape, report)


@dataclass
class _Blocks(Opened):
    """Rows of a matrix whose scales belong to runs of the flat matrix."""

    scale_RC: Tensor | None = None

    def values(self, piece: slice) -> Tensor:
        assert self.scale_RC is not None
        return self.codes(piece) * self.scale_RC[piece]


def _by_table(name: str, found: Mapping[str, Source], shape: tuple[int, int], report: Report) -> Grid:
    """Indices of a table, the upper half of a byte first, and one scale per block of the flat matrix."""
    kinds = [kind for kind in _TABLES if kind in found]
    weight, peaks, table, words = need(name, found, "weight", "absmax", "quant_map", *(kinds[:1] or ["nf4"]))
    try:
        state: dict[str, Any] = json.loads(bytes(read(words).to(torch.uint8).tolist()))
        block, stored = int(state["blocksize"]), tuple(state["shape"])
    except (ValueError, KeyError, TypeError) as error:
        raise ModelLoadError(f"{words.name}: no state of a 4-bit matrix: {error!r}") from None
    rows, columns = shape
    if stored != shape:
        raise ModelLoadError(f"{words.name} says {list(stored)}, expected {list(shape)} for {name}")
    octets = weight.shape[0] * weight.dtype.itemsize * (weight.shape[1] if len(weight.shape) > 1 else 1)
    blocks = -(-rows * columns // block)
    if octets != -(-rows * columns // 2):
        raise ModelLoadError(f"{weight.name} has {octets} bytes, expected {-(-rows * columns // 2)} for {list(shape)}")
    check_shape(peaks, (blocks,), of=f"{name}: {blocks} blocks of {block}")
    check_shape(table, (16,), of=f"the table of {name}")
    nested = need(name, found, "nested_absmax", "nested_quant_map") if "nested_absmax" in found else None
    offset = float(state.get("nested_offset", 0.0))

    def open_(entry: int, rows: slice, cols: slice) -> Opened:
        del entry
        values, scale = read(table).float(), _scales(peaks, nested, offset)
        octets = read(weight).reshape(-1).view(torch.uint8)
        first, last = rows.start * columns, rows.stop * columns
        own = octets[first // 2 : -(-last // 2)]
        codes = torch.stack((own >> 4, own & 15), -1).flatten()[first % 2 :][: last - first].unflatten(0, (-1, columns))
        place = torch.arange(first, last).unflatten(0, (-1, columns)) // block
        codes, place = codes[:, cols], place[:, cols]
        return _Blocks(lambda piece: values[codes[piece].int()], scale, place[0], scale_RC=scale[place])

    return Grid(name, shape, open=open_, report=report, why=_WHY)


def _scales(peaks: Source, nested: list[Source] | None, offset: float) -> Tensor:
    """float32, one per block; nested ones are indices of a table with scales of their own."""
    found = read(peaks)
    if nested is None:
        return found.float()
    outer, table = read(nested[0]).float(), read(nested[1]).float()
    return table[found.int()] * outer[torch.arange(len(found)) // _NESTED] + offset


METHOD = Method("bitsandbytes", configure=configure)
