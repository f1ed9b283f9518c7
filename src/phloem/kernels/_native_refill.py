"""New values for packed weights in the memory of the old ones: recorded steps hold addresses, and see them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from phloem.kernels.native_linear import PackedLinear

_DATA = 0  # column of `segments` with the address of a segment's bytes


def refill(old: Any, new: Any) -> bool:
    """Copy a packed weight's bytes over an older one of the same layout. False, and nothing done, for another one.

    A weight with a screen (`_native_screen`) is another one too: the screen is made of the old values.
    """
    if old.screen is not None or not _alike(old, new):
        return False
    for target, source in zip(old.memory, new.memory, strict=True):
        target.copy_(source)
    return True


def _alike(old: PackedLinear, new: PackedLinear) -> bool:
    same = old.shape == new.shape and old.forms == new.forms and old.kinds == new.kinds and old.split == new.split
    if not same or old.paired != new.paired or [m.numel() for m in old.memory] != [m.numel() for m in new.memory]:
        return False
    return torch.equal(old.segments[:, _DATA + 1 :], new.segments[:, _DATA + 1 :])


def memory(weight: Any) -> list[torch.Tensor]:
    """A packed weight's bytes."""
    return list(weight.memory)


def renew(weight: Any) -> None:
    """The float32 copy of the bias that the kernels read."""
    if isinstance(weight, torch.Tensor) or weight.bias is None:
        return
    bias, kept = weight.bias
    if kept is not bias:
        kept.copy_(bias)
