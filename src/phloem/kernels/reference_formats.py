"""Numbers of 8 bits with their scales, in plain torch: what Triton's narrow products are compared with."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def quantise_fp8(x_TN: Tensor, dtype: torch.dtype, group: int | None = None) -> tuple[Tensor, Tensor]:
    """Values and float32 scales per token (group None: scales [T]) or per token and group ([T, N / group])."""
    limit = torch.finfo(dtype).max
    width = group or x_TN.shape[1]
    padded = F.pad(x_TN.float(), (0, -x_TN.shape[1] % width)).unflatten(1, (-1, width))
    scale = padded.abs().amax(-1).clamp_min(1e-10) / limit
    values = (padded / scale.unsqueeze(-1)).clamp(-limit, limit).to(dtype).flatten(1)[:, : x_TN.shape[1]]
    return values, scale if group else scale[:, 0]


def quantise_blocks(weight_MN: Tensor, dtype: torch.dtype, block: int = 128) -> tuple[Tensor, Tensor]:
    """A weight [..., M, N] in float8 with one float32 scale per block x block, [..., M / block, N / block]."""
    rows, cols = weight_MN.shape[-2:]
    padded = F.pad(weight_MN.float(), (0, -cols % block, 0, -rows % block))
    tiles = padded.unflatten(-1, (-1, block)).unflatten(-3, (-1, block))
    limit = torch.finfo(dtype).max
    scale = tiles.abs().amax((-3, -1)).clamp_min(1e-10) / limit
    values = (tiles / scale[..., :, None, :, None]).clamp(-limit, limit).to(dtype)
    return values.flatten(-2).flatten(-3, -2)[..., :rows, :cols].contiguous(), scale


def spread_blocks(values_MN: Tensor, scale: Tensor, block: int = 128) -> Tensor:
    """What `quantise_blocks` stands for, in float32."""
    rows, cols = values_MN.shape[-2:]
    spread = scale.repeat_interleave(block, -2)[..., :rows, :].repeat_interleave(block, -1)[..., :cols]
    return values_MN.float() * spread


def spread_groups(values_TN: Tensor, scale: Tensor, group: int = 128) -> Tensor:
    """Values times their token-and-group scales, in float32."""
    return values_TN.float() * scale.repeat_interleave(group, -1)[:, : values_TN.shape[1]]
