"""Dense weights quantised while they are loaded: groups of 32 inputs with a float16 scale (and minimum).

The result has the bytes of GGUF's Q8_0 or Q4_1, so that every table that reads those reads these.
Legend: M outputs, N inputs, G groups.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn.functional import pad

from phloem.kernels.narrow import Codes, Narrow

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from phloem.kernels.ops import WeightSource

    Groups = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]

GROUP = 32
FLOAT_KINDS = ("dense", "BF16", "F16", "F32")
# Few enough that the intermediates stay in a core's cache, and that torch does not start threads of its own for them.
_ELEMENTS_AT_ONCE = (1 << 15) - 1
_ELEMENTS_ON_DEVICE = 1 << 22
HOST = torch.device("cpu")
# How much of a group's range four bits cover: cutting off its ends can make the steps fit the rest better.
_SHRINK = (1.0, 0.93, 0.86)
_FLAT = 60000.0  # steps between zero and the minimum, from which on float16 holds no zero point


def int8_groups(x_MGK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(integers -127..127, float16 scale, zero minimum) of groups [M, G, 32]."""
    scale = (x_MGK.abs().amax(-1, keepdim=True) / 127).half()
    wide = scale.float()
    q = torch.where(wide > 0, x_MGK / wide, 0.0).round().clamp(-127, 127)
    return q, scale, torch.zeros_like(scale)


def int4_groups(x_MGK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(integers 0..15, float16 scale, float16 minimum), of least squared error over a few ranges.

    Each range is refined once: with the integers fixed, scale and minimum are a linear least-squares fit.
    """
    low, high = x_MGK.amin(-1, keepdim=True), x_MGK.amax(-1, keepdim=True)
    best: tuple[Tensor, Tensor, Tensor] | None = None
    best_error = torch.full_like(low, float("inf"))
    for shrink in _SHRINK:
        scale, minimum = (high - low) * (shrink / 15), low + (high - low) * ((1 - shrink) / 2)
        q = _steps(x_MGK, scale, minimum)
        centred = q - q.mean(-1, keepdim=True)
        spread = centred.square().sum(-1, keepdim=True)
        fitted = torch.where(spread > 0, (centred * x_MGK).sum(-1, keepdim=True) / spread.clamp_min(1e-30), scale)
        scale16 = fitted.half()
        minimum16 = (x_MGK.mean(-1, keepdim=True) - fitted * q.mean(-1, keepdim=True)).half()
        q = _steps(x_MGK, scale16.float(), minimum16.float())
        error = (q * scale16.float() + minimum16.float() - x_MGK).square().sum(-1, keepdim=True)
        better = error < best_error
        if best is None:
            best = (q, scale16, minimum16)
        else:
            best = tuple(torch.where(better, new, old) for new, old in zip((q, scale16, minimum16), best, strict=True))  # pyright: ignore[reportAssignmentType]
        best_error = torch.minimum(error, best_error)
    assert best is not None
    return best


def _steps(x: Tensor, scale: Tensor, minimum: Tensor) -> Tensor:
    return torch.where(scale != 0, (x - minimum) / scale, 0.0).round().clamp(0, 15)


class GroupQuantised:
    """A `WeightSource` whose dense values are quantised when they are read."""

    def __init__(self, source: WeightSource, bits: int) -> None:
        self.source = source
        self.name = source.name
        self.shape = tuple(source.shape)
        self.bits = bits
        self.kind = "Q8_0" if bits == 8 else "Q4_1"

    def raw(self) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """Blocks as GGUF stores them, `[out_features, bytes per row]`; inputs are padded with zeros to whole groups."""
        return self._of_rows(lambda groups: _to_bytes(*groups, self.bits)).numpy()

    def dense(self, dtype: torch.dtype) -> Tensor:
        """What the quantised weight stands for."""

        def values(groups: tuple[Tensor, Tensor, Tensor]) -> Tensor:
            q, scale, minimum = groups
            return (q * scale.float() + minimum.float()).flatten(1).to(dtype)

        return self._of_rows(values)[:, : self.shape[1]].contiguous()

    def narrow(self) -> Narrow | str:
        """What kernels for narrow weights can be given; "": nothing, and nobody asked."""
        if self.shape[1] % GROUP:
            return ""
        return Narrow("int4", 1, GROUP, True) if self.bits == 4 else Narrow("int8", 1, GROUP, half=True)

    def codes(self) -> Codes:
        """Numbers 0 to 15 whose zero point is what the group's minimum is in steps, or 1 to 255 without."""

        def flat(groups: tuple[Tensor, Tensor, Tensor]) -> Tensor:
            q, *numbers = _with_zero(*groups) if self.bits == 4 else (groups[0] + 128, groups[1].float())
            return torch.cat((q.to(torch.uint8), *(n.contiguous().view(torch.uint8) for n in numbers)), -1)

        q, *numbers = self._of_rows(flat).split((GROUP, 4, 4)[: 3 if self.bits == 4 else 2], -1)
        scale, *zero = (n.contiguous().view(torch.float32).squeeze(-1) for n in numbers)
        return Codes(q.flatten(1), scale, *zero)

    def refused(self, why: str) -> None:
        """Nobody counts what was plain in the file."""

    def _of_rows(self, give: Callable[[tuple[Tensor, Tensor, Tensor]], Tensor]) -> Tensor:
        """What `give` makes of the groups of some rows, for all rows, made by the loader's workers if there are any."""
        values_MN = self.source.dense(torch.float32)
        method: Groups = int8_groups if self.bits == 8 else int4_groups

        def part(rows: Tensor) -> Tensor:
            return give(method(pad(rows, (0, -self.shape[1] % GROUP)).unflatten(1, (-1, GROUP))))

        workers = getattr(self.source, "workers", None)
        host = values_MN.device == HOST
        parts = values_MN.split(max(1, (_ELEMENTS_AT_ONCE if host else _ELEMENTS_ON_DEVICE) // self.shape[1]))
        return torch.cat(list((workers.map if workers and host else map)(part, parts)))


def _with_zero(q_MGK: Tensor, scale: Tensor, minimum: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(integers, scale, zero point), float32, of integers with a scale and a minimum: (q - zero) * scale. Where all of
    a group are as good as one number, the scale is that number, and the zero point 1."""
    wide, low = scale.float(), minimum.float()
    one = low.abs() > _FLAT * wide.abs()
    scale = torch.where(one, -low, torch.where(wide == 0, 1.0, wide))
    zero = torch.where(one, 1.0, torch.where(wide == 0, 0.0, -low / scale))
    return torch.where(one, 0.0, q_MGK), scale, zero


def _to_bytes(q_MGK: Tensor, scale: Tensor, minimum: Tensor, bits: int) -> Tensor:
    if bits == 8:
        fields = (scale.view(torch.uint8), q_MGK.to(torch.int8).view(torch.uint8))
    else:
        q = q_MGK.to(torch.uint8)
        fields = (scale.view(torch.uint8), minimum.view(torch.uint8), q[..., :16] | q[..., 16:] << 4)
    return torch.cat(fields, -1).flatten(1)


def quantised(source: WeightSource, bits: int) -> WeightSource:
    """A matrix of floats quantised to 8 or 4 bits; what is quantised already, and vectors, stay as they are.

    Embedding and head keep 8 bits: they are read by row, and their errors reach the logits directly.
    """
    if source.kind not in FLOAT_KINDS or len(source.shape) != 2 or prod(source.shape) == 0:
        return source
    outer = "embed_tokens" in source.name or source.name.startswith("lm_head")
    return GroupQuantised(source, 8 if outer else bits)
