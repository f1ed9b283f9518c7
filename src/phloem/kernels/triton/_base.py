"""What several kernel files share: device functions, tile search over ragged rows, host-side rounding.

Legend of all kernel files: T tokens, R rows (requests), H query heads, K kv heads, D head size, S page size, N input
features, M output features, E experts, V vocabulary. Arithmetic is float32 right after each load; only `tl.dot` takes
its operands in the tensors' own type. The last axis of every tensor is contiguous; other axes may be strided.

Triton compiles a kernel anew where an integer argument becomes 1 or a multiple of 16, or ceases to be: what changes
from step to step (tokens, rows, pairs, splits, the width of the page table) is `do_not_specialize` in every kernel.
"""

# What Triton's stubs do not describe: untyped kernel parameters, launches by subscript, constexpr arguments.
# pyright: reportMissingParameterType=false, reportMissingImports=false, reportIndexIssue=false
# pyright: reportArgumentType=false, reportCallIssue=false, reportPossiblyUnboundVariable=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from phloem.kernels.triton.early import await_previous, early

LOG2E = 1.4426950408889634
FP8_TYPES = tuple(
    getattr(torch, name) for name in ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2") if hasattr(torch, name)
)


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The least power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def fp8_limit(dtype: torch.dtype) -> float:
    """Largest finite value of a float8 type; 0 for any other type."""
    return torch.finfo(dtype).max if dtype in FP8_TYPES else 0.0


def stages(wanted: int) -> int:
    """Depth of a loop's software pipeline; AMD's 64 KiB of shared memory per block hold two at most."""
    return min(wanted, 2) if torch.version.hip else wanted


def rows_2d(x: Tensor) -> Tensor:
    """x as [rows, N] without a copy where its strides allow it."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


@triton.jit
def tanh(x):
    return 2.0 * tl.sigmoid(2.0 * x) - 1.0


@triton.jit
def gelu_tanh(x):
    return 0.5 * x * (1.0 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))


@triton.jit
def silu(x):
    return x * tl.sigmoid(x)


@triton.jit
def activate(x, KIND: tl.constexpr):
    """KIND 0: SiLU, 1: GELU (tanh)."""
    if KIND == 0:
        return silu(x)
    else:
        return gelu_tanh(x)


@triton.jit
def widened(x, like):
    """x in the type of `like`. From float8 to bfloat16 by way of float32: exact as well, and four fast instructions a
    pair, where the straight way takes two of the slowest kind (`scripts/triton_code.py` counts them)."""
    if like.dtype == tl.bfloat16:
        if x.dtype.is_fp8():
            return x.to(tl.float32).to(tl.bfloat16)
        else:
            return x.to(tl.bfloat16)
    else:
        return x.to(like.dtype)


@triton.jit
def half_beside(query, keys):
    """Queries as they meet float8 keys: of bfloat16, in float16, which float8 becomes in half as many instructions.
    Nothing is lost but what float16 does not reach, beyond 65504 or far below the least of such a key."""
    if query.dtype == tl.bfloat16:
        if keys.dtype.element_ty.is_fp8():
            wide = query.to(tl.float32)
            return tl.minimum(tl.maximum(wide, -65504.0), 65504.0).to(tl.float16)
        else:
            return query
    else:
        return query


@triton.jit
def soften(scores, top, mass):
    """One block's part of an online softmax in base 2 (FlashAttention-2): (weights, shrink of what was summed so far,
    maximum, mass), for scores [rows, columns] beside the maximum and the mass of the blocks before."""
    new_top = tl.maximum(top, tl.max(scores, axis=1))
    # A row may have seen nothing yet: subtracting minus infinity from itself would give NaN.
    finite = tl.where(new_top == float("-inf"), 0.0, new_top)
    weights = tl.exp2(scores - finite[:, None])
    shrink = tl.exp2(top - finite)
    return weights, shrink, new_top, mass * shrink + tl.sum(weights, axis=1)


@triton.jit
def multiply(at_x, at_w, k, rows, cols, begin, end, acc, BLOCK_K: tl.constexpr):
    """acc + x wT over the features from `await_previous` to `end`; `at_x` and `at_w` point to the tile's first `k`."""
    for start in range(begin, end, BLOCK_K):
        some = start + k < end
        a = tl.load(at_x + start, mask=rows[:, None] & some[None, :], other=0.0)
        b = tl.load(at_w + start, mask=some[:, None] & cols[None, :], other=0)
        acc = tl.dot(a, b.to(a.dtype), acc, input_precision="ieee")
    return acc


@triton.jit
def find_row(query_start, tile, rows, BLOCK_T: tl.constexpr):
    """The row that token tile `tile` belongs to, where row r's tiles begin at query_start[r] // BLOCK_T + r.

    That sequence rises by at least the tiles each row needs, so `T // BLOCK_T + R` tiles serve every ragged batch
    and no host-side schedule is needed; a tile past its row's last token has nothing to do.
    """
    low = 0
    high = rows
    while low < high:
        middle = (low + high) // 2
        begins = tl.load(query_start + middle) // BLOCK_T + middle
        low = tl.where(begins <= tile, middle + 1, low)
        high = tl.where(begins <= tile, high, middle)
    return low - 1


@triton.jit
def splitmix64(x):
    """The splitmix64 output function (Steele, Lea and Flood 2014) of state x, as uint64."""
    z = x
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


@triton.jit(do_not_specialize=["splits"])
def _sum_splits(
    partial,
    bias,
    out,
    stride_s,
    stride_t,
    splits,
    features,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    await_previous(PDL)
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    keep = col < features
    total = tl.zeros([BLOCK], tl.float32)
    source = partial + row * stride_t + col
    for _ in range(splits):
        total += tl.load(source, mask=keep, other=0.0)
        source += stride_s
    if HAS_BIAS:
        total += tl.load(bias + col, mask=keep, other=0.0).to(tl.float32)
    tl.store(out + row * features + col, total.to(out.dtype.element_ty), mask=keep)


def split_target(out_TM: Tensor, splits: int, bias_M: Tensor | None) -> tuple[Tensor, bool]:
    """(Where a product of so many splits goes [S, T, M], whether that is the result): if not, `sum_splits` follows."""
    if splits == 1 and bias_M is None:
        return out_TM.unsqueeze(0), True
    return torch.empty((splits, *out_TM.shape), dtype=torch.float32, device=out_TM.device), False


def sum_splits(partial_STM: Tensor, bias_M: Tensor | None, out_TM: Tensor) -> Tensor:
    """out = sum of the splits in their order (so the result does not vary), plus bias."""
    splits, tokens, features = partial_STM.shape
    block = min(1024, power_of_2(features))
    grid = (tokens, ceil_div(features, block))
    _sum_splits[grid](
        partial_STM,
        bias_M if bias_M is not None else partial_STM,
        out_TM,
        partial_STM.stride(0),
        partial_STM.stride(1),
        splits,
        features,
        HAS_BIAS=bias_M is not None,
        BLOCK=block,
        **early(out_TM),
    )
    return out_TM
