"""Formats of 8 and 4 bits that dense weights are rounded to while they are loaded, and what keeps them small."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any

import torch

from phloem.kernels.narrow import FLOAT4_GROUP, Codes, Narrow
from phloem.quant._bits import TWICE_E2M1, e2m1_of
from phloem.quant._grid import BLOCK, Opened
from phloem.quant._groups import FLOAT_KINDS, GroupQuantised

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from torch import Tensor

    from phloem.kernels.ops import WeightSource

FLOAT8_LIMIT = 448.0  # of e4m3
_LARGEST_E2M1 = 6.0
_EVERYTHING = slice(None)
_ELEMENTS_AT_ONCE = 1 << 20


class Rounded:
    """A `WeightSource` whose values are those that a format of fewer bits can hold.

    Args:
        opened: codes and scales of float32 weights [M, N].
    """

    def __init__(self, source: WeightSource, kind: str, opened: Callable[[Tensor], Opened]) -> None:
        self.source = source
        self.name = source.name
        self.shape = tuple(source.shape)
        self.kind = kind
        self.opened = opened

    def dense(self, dtype: torch.dtype) -> Tensor:
        return self._of_rows(lambda opened: opened.values(_EVERYTHING).to(dtype))

    def raw(self) -> np.ndarray[Any, np.dtype[np.uint8]]:
        if self.kind == "dense":
            raise TypeError(f"{self.name} is dense: it has no quantised bytes")
        return self._of_rows(lambda opened: opened.blocks(_EVERYTHING, self.kind)).numpy()

    def _of_rows(self, give: Callable[[Opened], Tensor]) -> Tensor:
        """What `give` makes of some rows at a time, for all of them: intermediates are several times their size."""
        parts = self.source.dense(torch.float32).split(max(1, _ELEMENTS_AT_ONCE // self.shape[1]))
        return torch.cat([give(self.opened(part)) for part in parts])


class Float8Rounded(Rounded):
    """e4m3 with a scale per output (`kernels.narrow.GivesCodes`)."""

    def __init__(self, source: WeightSource) -> None:
        super().__init__(source, "dense", _as_float8)

    def narrow(self) -> Narrow | str:
        return Narrow("float8", 1, self.shape[1])

    def codes(self) -> Codes:
        parts = self.source.dense(torch.float32).split(max(1, _ELEMENTS_AT_ONCE // self.shape[1]))
        found = [float8_codes(part) for part in parts]
        # As bytes: not every device joins float8.
        values = torch.cat([codes.view(torch.uint8) for codes, _ in found]).view(torch.float8_e4m3fn)
        return Codes(values, torch.cat([scale for _, scale in found]))

    def refused(self, why: str) -> None:
        """Nobody counts what was plain in the file."""


class Float4Rounded(Rounded):
    """4-bit floats with a power of two per row and 32 columns (`kernels.narrow.GivesCodes`)."""

    def __init__(self, source: WeightSource) -> None:
        super().__init__(source, "dense" if source.shape[1] % BLOCK else "Q5_0", _as_mxfp4)

    def narrow(self) -> Narrow | str:
        whole = self.shape[1] % FLOAT4_GROUP == 0
        return Narrow("mxfp4", 1, FLOAT4_GROUP) if whole else f"{self.shape[1]} columns are no groups of {FLOAT4_GROUP}"

    def codes(self) -> Codes:
        opened = [
            _as_mxfp4(part)
            for part in self.source.dense(torch.float32).split(max(1, _ELEMENTS_AT_ONCE // self.shape[1]))
        ]
        values = torch.cat([e2m1_of(each.codes(_EVERYTHING)) for each in opened])
        return Codes(values, torch.cat([each.scale_RG * 2 for each in opened]))

    def refused(self, why: str) -> None:
        """Nobody counts what was plain in the file."""


def _stays(source: WeightSource) -> bool:
    return source.kind not in FLOAT_KINDS or len(source.shape) != 2 or prod(source.shape) == 0


def _outer(source: WeightSource) -> bool:
    return "embed_tokens" in source.name or source.name.startswith("lm_head")


def float8_rows(source: WeightSource) -> WeightSource:
    """float8 (e4m3) with a scale per output. Embedding and head stay as they are."""
    return source if _stays(source) or _outer(source) else Float8Rounded(source)


def _as_float8(values_MN: Tensor) -> Opened:
    codes, scale = float8_codes(values_MN)
    return Opened(lambda piece: codes[piece], scale, torch.zeros(values_MN.shape[1], dtype=torch.int64))


def float8_codes(values_MN: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 values [M, N] and float32 scales [M, 1] of float32 weights."""
    scale = (values_MN.abs().amax(1, keepdim=True) / FLOAT8_LIMIT).clamp_min(1e-12)
    return (values_MN / scale).clamp(-FLOAT8_LIMIT, FLOAT8_LIMIT).to(torch.float8_e4m3fn), scale


def mxfp4_blocks(source: WeightSource) -> WeightSource:
    """4-bit floats with a power of two per 32 inputs. Embedding and head have 8 bits, as with `int4`."""
    if _stays(source):
        return source
    if _outer(source):
        return GroupQuantised(source, 8)
    return Float4Rounded(source)


def _as_mxfp4(values_MN: Tensor) -> Opened:
    columns = values_MN.shape[1]
    blocks = torch.nn.functional.pad(values_MN, (0, -columns % BLOCK)).unflatten(1, (-1, BLOCK))
    peak = blocks.abs().amax(-1).clamp_min(2.0**-20)
    # The specification's exponent clips what lies above 6 times it; the next one up loses a bit below. The better wins.
    low = torch.exp2((torch.log2(peak).floor() - 2).clamp(-22, 15))
    found = [(scale, _nearest_e2m1(blocks / scale.unsqueeze(-1))) for scale in (low, low * 2)]
    errors = [(twice * (scale / 2).unsqueeze(-1) - blocks).square().sum(-1) for scale, twice in found]
    better = errors[1] < errors[0]
    scale = torch.where(better, found[1][0], found[0][0])
    twice = torch.where(better.unsqueeze(-1), found[1][1], found[0][1]).to(torch.int8).flatten(1)[:, :columns]
    return Opened(lambda piece: twice[piece], scale / 2, torch.arange(columns) // BLOCK)


def _nearest_e2m1(x: Tensor) -> Tensor:
    """Twice the nearest values of e2m1, ties to the even code."""
    levels = torch.tensor(TWICE_E2M1[:8], dtype=torch.float32)
    borders = (levels[1:] + levels[:-1]) / 2
    size = (x.abs() * 2).clamp_max(2 * _LARGEST_E2M1)
    up, down = torch.bucketize(size, borders, right=True), torch.bucketize(size, borders)
    return levels[torch.where(up % 2 == 0, up, down)] * x.sign()
