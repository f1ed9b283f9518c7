"""A dense matrix as compressed-tensors stores it in 4 or 8 bits: what `phloem quantize` writes.

Legend: M outputs, N inputs, G groups.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import pad

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    Written = tuple[dict[str, Tensor], Tensor]  # tensors by their names behind the module's; the values they stand for

FLOAT8_LIMIT = 448.0  # of e4m3
_SMALLEST = 2.0**-20  # scale of rows of zeros: float16 holds it
# How much of a group's range the steps cover: cutting off its ends can make them fit the rest better.
_SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8)
_ELEMENTS_AT_ONCE = 1 << 22


def int4(weight_MN: Tensor, group: int) -> Written:
    """Steps of least squared error over a few ranges, with a whole zero point each; N is a multiple of `group`."""
    rows = max(1, _ELEMENTS_AT_ONCE // weight_MN.shape[1])
    parts = [_int4_rows(part, group) for part in weight_MN.split(rows)]
    q_MN, scale_MG, zero_MG, values_MN = (torch.cat(found) for found in zip(*parts, strict=True))
    return {
        "weight_packed": _words(q_MN),
        "weight_scale": scale_MG,
        "weight_zero_point": _words(zero_MG.T).T.contiguous(),
        "weight_shape": torch.tensor(weight_MN.shape),
    }, values_MN


def _int4_rows(weight: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x_MGK = weight.float().unflatten(1, (-1, group))
    low, high = x_MGK.amin(-1, keepdim=True).clamp_max(0), x_MGK.amax(-1, keepdim=True).clamp_min(0)
    best: tuple[Tensor, ...] | None = None
    for shrink in _SHRINK:
        # Rounded as it is stored, before the integers are chosen.
        scale = ((high - low) * (shrink / 15)).clamp_min(_SMALLEST).to(weight.dtype).float()
        zero = (-low * shrink / scale).round().clamp(0, 15)
        q = (x_MGK / scale + zero).round().clamp(0, 15)
        values = (q - zero) * scale
        error = (values - x_MGK).square().sum(-1, keepdim=True)
        found = (q, scale, zero, values, error)
        if best is None:
            best = found
        else:
            better = error < best[-1]
            best = tuple(torch.where(better, new, old) for new, old in zip(found, best, strict=True))
    assert best is not None
    q, scale, zero, values, _ = best
    octets = q.to(torch.uint8).flatten(1), zero.squeeze(-1).to(torch.uint8)
    return octets[0], scale.squeeze(-1).to(weight.dtype), octets[1], values.flatten(1)


def _words(q: Tensor) -> Tensor:
    """int32, eight numbers of 4 bits a word along the last axis, lowest first."""
    eight = pad(q, (0, -q.shape[1] % 8))
    octets = torch.empty((q.shape[0], eight.shape[1] // 2), dtype=torch.uint8)
    return torch.add(eight[:, 0::2], eight[:, 1::2] << 4, out=octets).view(torch.int32)


def int8(weight_MN: Tensor, group: int) -> Written:
    """A scale per output."""
    del group
    wide = weight_MN.float()
    scale = (wide.abs().amax(1, keepdim=True) / 127).clamp_min(_SMALLEST).to(weight_MN.dtype)
    q = (wide / scale.float()).round().clamp(-127, 127)
    return {"weight": q.to(torch.int8), "weight_scale": scale}, q * scale.float()


def fp8(weight_MN: Tensor, group: int) -> Written:
    """e4m3 with a scale per output."""
    del group
    wide = weight_MN.float()
    scale = (wide.abs().amax(1, keepdim=True) / FLOAT8_LIMIT).clamp_min(_SMALLEST).to(weight_MN.dtype)
    codes = (wide / scale.float()).clamp(-FLOAT8_LIMIT, FLOAT8_LIMIT).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale": scale}, codes.float() * scale.float()


WRITERS: dict[str, Callable[[Tensor, int], Written]] = {"int4": int4, "int8": int8, "fp8": fp8}


def scheme(kind: str, group: int, ignore: list[str]) -> dict[str, Any]:
    """`quantization_config` of a checkpoint whose linear layers, but for `ignore`, are written so."""
    shared = {"dynamic": False, "observer": "minmax", "actorder": None, "block_structure": None}
    of: dict[str, dict[str, Any]] = {
        "int4": {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": group},
        "int8": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "group_size": None},
        "fp8": {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel", "group_size": None},
    }
    weights = {**of[kind], **shared}
    inputs = {**of[kind], **shared, "strategy": "token", "dynamic": True, "observer": None} if kind != "int4" else None
    layout = {"int4": "pack-quantized", "int8": "int-quantized", "fp8": "float-quantized"}[kind]
    groups = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "config_groups": {"group_0": {**groups, "format": layout}},
        "ignore": ignore,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }
