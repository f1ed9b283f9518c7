"""An adapter's part on each of several ranks that share linear layers out: cut as the layer is cut.

A rank with some of the outputs has their columns of `up`. One with some of the inputs has their columns of `down`, and
adds to its part of a sum. Factors of DoRA are not there, as no rank reads the whole of a weight; what is added to
outputs, one rank adds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from phloem.adapters._fits import Fit

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from phloem.layers.linear import Linear


@dataclass(frozen=True, slots=True)
class Share:
    """What one rank has of a layer."""

    inputs: slice
    outputs: Tensor  # int64: which of all parts' outputs, in order
    adds: bool  # this rank adds what is not a product

    @staticmethod
    def of(layer: Linear) -> Share | None:
        """None: all of it."""
        weight = layer.weight
        if not any(weight.cuts):
            return None
        rows: list[Tensor] = []
        start = 0
        for part, shape in enumerate(weight.shapes):
            first, last = weight.spans(part)[0]
            rows.append(torch.arange(start + first, start + last))
            start += shape[0]
        return Share(slice(*weight.spans(0)[1]), torch.cat(rows), layer.comm is None or layer.comm.rank == 0)

    def cut(self, fit: Fit) -> Fit:
        """Of what the whole layer would keep."""
        columns = self.outputs
        found = Fit(fit.rank, fit.down[:, :, self.inputs], fit.up[:, columns])
        if fit.factor is not None and fit.shift is not None:
            found.factor, shift = fit.factor[columns], fit.shift[columns]
            found.shift = shift if self.adds else torch.zeros_like(shift)
        return found


def packed(fits: Mapping[int, Fit]) -> bytes:
    """For the other ranks."""
    from safetensors.torch import save

    found: dict[str, Tensor] = {}
    for number, fit in fits.items():
        parts = {"down": fit.down, "up": fit.up, "factor": fit.factor, "shift": fit.shift}
        for name, part in parts.items():
            if part is not None:  # a copy: the format refuses tensors that share memory
                found[f"{number}.{name}"] = part.clone(memory_format=torch.contiguous_format)
    return save(found)


def unpacked(data: bytes) -> dict[int, Fit]:
    """As `packed` had them."""
    from safetensors.torch import load

    parts: dict[int, dict[str, Tensor]] = {}
    for key, tensor in load(data).items():
        number, _, name = key.partition(".")
        parts.setdefault(int(number), {})[name] = tensor
    return {number: Fit(one["up"].shape[0], **one) for number, one in parts.items()}
