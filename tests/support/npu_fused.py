"""Fused ops of torch_npu as its documentation tells of them, in plain torch, on any device."""

from __future__ import annotations

from collections import Counter

import torch

CALLS: Counter[str] = Counter()  # how often which was called


def npu_rms_norm(x: torch.Tensor, gamma: torch.Tensor, epsilon: float = 1e-6) -> tuple[torch.Tensor, torch.Tensor]:
    CALLS["npu_rms_norm"] += 1
    assert x.dtype == gamma.dtype
    wide = x.float()
    reciprocal = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    return (wide * reciprocal * gamma.float()).to(x.dtype), reciprocal


def npu_add_rms_norm(
    x1: torch.Tensor, x2: torch.Tensor, gamma: torch.Tensor, epsilon: float = 1e-6
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    CALLS["npu_add_rms_norm"] += 1
    total = x1 + x2
    return *npu_rms_norm(total, gamma, epsilon), total


def npu_swiglu(x: torch.Tensor, dim: int = -1) -> torch.Tensor:
    CALLS["npu_swiglu"] += 1
    first, second = torch.chunk(x, 2, dim)
    return torch.nn.functional.silu(first) * second


def npu_rotary_mul(x: torch.Tensor, r1: torch.Tensor, r2: torch.Tensor, rotary_mode: str = "half") -> torch.Tensor:
    CALLS["npu_rotary_mul"] += 1
    assert x.dim() == r1.dim() == r2.dim() == 4 and x.shape[-1] == r1.shape[-1] and x.dtype == r1.dtype
    if rotary_mode == "half":
        x1, x2 = torch.chunk(x, 2, -1)
        turned = torch.cat((-x2, x1), -1)
    else:
        turned = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
    return r1 * x + r2 * turned
