"""The tokens that a step begins and ends with: one launch each."""

# What Triton's stubs do not describe: untyped kernel parameters, launches by subscript, constexpr arguments.
# pyright: reportMissingParameterType=false, reportMissingImports=false, reportIndexIssue=false
# pyright: reportArgumentType=false, reportCallIssue=false, reportPossiblyUnboundVariable=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from phloem.kernels.triton._base import ceil_div

BLOCK = 128


@triton.jit(do_not_specialize=["count"])
def _late_tokens(ids, last, slots, count, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    keep = at < count
    late = keep & (tl.load(ids + at, mask=keep, other=0) < 0)
    slot = tl.load(slots + at, mask=late, other=0)
    tl.store(ids + at, tl.load(last + slot, mask=late, other=0), mask=late)


def late_tokens_(ids_T: Tensor, last_S: Tensor, slots_T: Tensor) -> None:
    """In place: ids below 0 become the last token of their slot."""
    count = ids_T.shape[0]
    if count:
        _late_tokens[(ceil_div(count, BLOCK),)](ids_T, last_S, slots_T, count, BLOCK=BLOCK)


@triton.jit(do_not_specialize=["count"])
def _keep_tokens(last, slots, tokens, sound, out, count, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    keep = at < count
    token = tl.load(tokens + at, mask=keep, other=0)
    value = tl.load(sound + at, mask=keep, other=0.0).to(tl.float32)
    tl.store(last + tl.load(slots + at, mask=keep, other=0), token.to(tl.int64), mask=keep)
    token = token.to(tl.int32)
    tl.store(out + at, tl.where(value != value, -1 - token, token), mask=keep)


def keep_tokens_(last_S: Tensor, slots_L: Tensor, tokens_L: Tensor, sound_L: Tensor) -> Tensor:
    """last[slots] = tokens; int32 [L]: the token, or -1 - token where `sound` is NaN. Slots are distinct."""
    count = tokens_L.shape[0]
    out = torch.empty(count, dtype=torch.int32, device=tokens_L.device)
    if count:
        _keep_tokens[(ceil_div(count, BLOCK),)](last_S, slots_L, tokens_L, sound_L, out, count, BLOCK=BLOCK)
    return out
