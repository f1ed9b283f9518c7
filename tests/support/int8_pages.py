"""Pages of the int8 KV cache as csrc/cpu/int8_page.h describes them, made and read by torch.

Legend: P pages, K kv heads, S page size, D head size, B tokens of a block.
"""

from __future__ import annotations

import torch


def _block(page_size: int) -> int:
    return next(tokens for tokens in (16, 8, 4) if page_size % tokens == 0)


def pack(values: torch.Tensor, scale: torch.Tensor, keys: bool) -> torch.Tensor:
    """Whole numbers `[P, K, S, D]` and their scales `[P, K, S, 1]` as `[P, K, S, D + 4]` int8."""
    *outer, page_size, size = values.shape
    tokens = _block(page_size)
    blocks = values.nan_to_num(0).to(torch.int16).view(*outer, -1, tokens, size)
    if keys:
        bytes_ = (blocks + 128).to(torch.uint8).view(torch.int8).unflatten(-1, (-1, 4)).transpose(-3, -2)
    else:
        bytes_ = blocks.to(torch.int8).unflatten(-2, (-1, 4)).transpose(-2, -1)
    scales = scale.float().reshape(*outer, -1, tokens).view(torch.int8)
    return torch.cat((bytes_.flatten(-3), scales), -1).reshape(*outer, page_size, size + 4)


def unpack(pages: torch.Tensor, keys: bool) -> torch.Tensor:
    """The float32 values `[P, K, S, D]` that int8 pages stand for."""
    *outer, page_size, width = pages.shape
    tokens, size = _block(page_size), width - 4
    blocks = pages.reshape(*outer, -1, tokens * width)
    bytes_, scales = blocks[..., : tokens * size], blocks[..., tokens * size :].contiguous().view(torch.float32)
    if keys:
        whole = bytes_.contiguous().view(torch.uint8).unflatten(-1, (size // 4, tokens, 4)).transpose(-3, -2)
        values = whole.flatten(-2).float() - 128
    else:
        values = bytes_.unflatten(-1, (tokens // 4, size, 4)).transpose(-2, -1).flatten(-3, -2).float()
    return (values * scales[..., None]).reshape(*outer, page_size, size)
