"""Kernels that are launched before the one ahead of them in the stream has ended (programmatic dependent launch).

What of a launch does not depend on that kernel then overlaps with its end: the launch itself, and the first
instructions. A kernel that is launched so waits before all else (`await_previous`), in every program, for the kernel
ahead to have ended and its writes to be seen; so whatever ran before in the stream has ended by then too, for each of
them waited likewise, and memory that is used again is free. Weights are not read before the wait either: an update may
just have written them. Having waited, a program lets the next kernel start. Kernels without `await_previous` are
launched as ever, after all is done.

From compute capability 9.0 on, unless `PHLOEM_PDL` is off; never under the interpreter.
"""

# What Triton's stubs do not describe: constexpr arguments.
# pyright: reportMissingImports=false, reportArgumentType=false, reportAssignmentType=false
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import triton
import triton.language as tl

from phloem.kernels.chosen import switched_on
from phloem.kernels.triton._device import capability

if TYPE_CHECKING:
    from torch import Tensor

CAPABLE = 90
SETTING = "PHLOEM_PDL"

try:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:  # a Triton that is built for other GPUs alone
    _there = False

    @triton.jit
    def gdc_wait():
        pass

    @triton.jit
    def gdc_launch_dependents():
        pass

else:
    _there = True


@triton.jit
def await_previous(PDL: tl.constexpr):
    """The first thing that a kernel does which is launched with `early`."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()


_on = cache(switched_on)  # a launch has no time to read the environment


def early(tensor: Tensor) -> dict[str, bool]:
    """Options for the launch of a kernel that begins with `await_previous`, on this tensor's device."""
    if _there and capability(tensor.device) >= CAPABLE and _on(SETTING):
        return {"PDL": True, "launch_pdl": True}
    return {"PDL": False}
