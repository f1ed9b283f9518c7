"""Batch-invariant ops: a token's result has the same bits whatever else is in the batch (He et al. 2025).

Three things make a result depend on the batch: a reduction cut differently for another batch size, another kernel for
another size, and atomics. So: one tile shape for every matmul and no splits over its features; attention cuts KV into
parts of fixed length; norms and log-sum-exp already work row by row.
"""

# What Triton's stubs do not describe: untyped kernel parameters, launches by subscript, constexpr arguments.
# pyright: reportMissingParameterType=false, reportMissingImports=false, reportIndexIssue=false
# pyright: reportArgumentType=false, reportCallIssue=false, reportPossiblyUnboundVariable=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from phloem.kernels.triton._base import ceil_div, multiply, stages
from phloem.kernels.triton.attention import decode_attention, extend_attention

if TYPE_CHECKING:
    from phloem.kernels.calls import AttentionCall, Cache, PagedBatch

SPLIT_TOKENS = 1024  # length of the parts that decode attention cuts a row's KV into
BLOCK_T, BLOCK_M = 64, 64


@triton.jit(do_not_specialize=["tokens"])
def _matmul(
    x,
    weight,
    bias,
    out,
    tokens,
    features_in,
    features_out,
    stride_x,
    stride_w,
    HAS_BIAS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    col = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    token = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    k = tl.arange(0, BLOCK_K)
    rows, cols = token < tokens, col < features_out
    at_x = x + token.to(tl.int64)[:, None] * stride_x + k[None, :]
    at_w = weight + col.to(tl.int64)[None, :] * stride_w + k[:, None]
    acc = tl.zeros([BLOCK_T, BLOCK_M], tl.float32)
    acc = multiply(at_x, at_w, k, rows, cols, 0, features_in, acc, BLOCK_K)
    if HAS_BIAS:
        acc += tl.load(bias + col, mask=cols, other=0.0).to(tl.float32)[None, :]
    at = out + token.to(tl.int64)[:, None] * features_out + col[None, :]
    tl.store(at, acc.to(out.dtype.element_ty), mask=rows[:, None] & cols[None, :])


def product(x_TN: Tensor, weight_MN: Tensor, bias_M: Tensor | None) -> Tensor:
    """x wT + bias, with one tile shape for every number of tokens."""
    tokens, features = x_TN.shape
    outputs = weight_MN.shape[0]
    out = torch.empty((tokens, outputs), dtype=x_TN.dtype, device=x_TN.device)
    if tokens:
        _matmul[(ceil_div(outputs, BLOCK_M), ceil_div(tokens, BLOCK_T))](
            x_TN,
            weight_MN,
            bias_M if bias_M is not None else x_TN,
            out,
            tokens,
            features,
            outputs,
            x_TN.stride(0),
            weight_MN.stride(0),
            HAS_BIAS=bias_M is not None,
            BLOCK_T=BLOCK_T,
            BLOCK_M=BLOCK_M,
            BLOCK_K=32 if x_TN.dtype == torch.float32 else 64,
            num_warps=4,
            num_stages=stages(3),
        )
    return out


def paged_attention(q_THD: Tensor, cache: Cache, batch: PagedBatch, call: AttentionCall) -> Tensor:
    """Decode with KV parts of fixed length, else extend, whose order of KV blocks is a row's own already."""
    if batch.max_query_len == 1:
        return decode_attention(q_THD, cache, batch, call, split_size=SPLIT_TOKENS)
    return extend_attention(q_THD, cache, batch, call)
