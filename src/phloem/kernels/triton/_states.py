"""Where the kernels of recurrent mixers find a row's state, and where they leave it: in tensors of a step's rows, or in
the pool itself (`calls.PooledStates`), so that a state is read once and written once.

No two rows of a step write to one place, and none reads where another writes, but for scratch, which nobody reads.
"""

# What Triton's stubs do not describe: untyped kernel parameters, constexpr arguments.
# pyright: reportMissingParameterType=false, reportMissingImports=false, reportPossiblyUnboundVariable=false
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

from phloem.kernels.calls import PooledStates

if TYPE_CHECKING:
    from torch import Tensor


@triton.jit
def place_before(places, fresh, row, POOLED: tl.constexpr):
    """(The row's place before the step, 1 or 0: whether a state lies there)."""
    place = tl.cast(row, tl.int64)
    there = 1
    if POOLED:
        place = tl.load(places + row)
        there = 1 - tl.load(fresh + row).to(tl.int32)
    return place, there


@triton.jit
def place_after(places, row, POOLED: tl.constexpr):
    place = tl.cast(row, tl.int64)
    if POOLED:
        place = tl.load(places + row)
    return place


class Held:
    """The states of a step's rows, as kernels are given them. `result` is what the op gives."""

    def __init__(self, states: Tensor | PooledStates, query_start: Tensor) -> None:
        self.pooled = isinstance(states, PooledStates)
        self.rows = query_start.shape[0] - 1
        self.result: Tensor | None = None
        if isinstance(states, PooledStates):
            self.before = self.after = states.pool
            self.places = states.reads, states.writes, states.fresh.view(torch.uint8)
        else:
            self.before = states.contiguous()
            self.after = self.result = torch.empty(states.shape, dtype=states.dtype, device=states.device)
            self.places = query_start, query_start, query_start  # not looked at

    def arguments(self) -> tuple[Any, ...]:
        """State before, state after, places before, places after, fresh, numbers from one place to the next."""
        return self.before, self.after, *self.places, self.before.stride(0)
