"""Quantised checkpoints as their formats are described, packed number by number: nothing of `phloem.quant` is used.

Each packer gives the tensors of a matrix [M, N] by their names behind the module's, and the float32 values that they
stand for. Words are made of Python's whole numbers, bit by bit.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

Packed = tuple[dict[str, torch.Tensor], torch.Tensor]
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def stream(numbers: list[int], bits: int) -> list[int]:
    """Words of 32 bits (as signed numbers) that hold the numbers one after another, lowest bits first."""
    whole = sum(number << bits * place for place, number in enumerate(numbers))
    count = -(-len(numbers) * bits // 32)
    words = [whole >> 32 * word & 0xFFFFFFFF for word in range(count)]
    return [word - (1 << 32) if word >> 31 else word for word in words]


def rows_of_words(table: np.ndarray[Any, Any], bits: int) -> torch.Tensor:
    return torch.tensor([stream([int(number) for number in row], bits) for row in table], dtype=torch.int32)


def affine(
    weight: torch.Tensor, bits: int, group: int, symmetric: bool, order: np.ndarray[Any, Any] | None = None
) -> tuple[np.ndarray[Any, Any], torch.Tensor, np.ndarray[Any, Any], torch.Tensor, np.ndarray[Any, Any]]:
    """Integers [M, N], float16 scales [M, G], zero points [M, G], values [M, N] and each column's group."""
    values = weight.double().numpy()
    rows, columns = values.shape
    groups = columns // (group or columns)
    of = np.arange(columns) // (group or columns) if order is None else order
    top = 2**bits - 1
    integers = np.zeros((rows, columns), np.int64)
    scales, zeros = np.zeros((rows, groups)), np.zeros((rows, groups), np.int64)
    for g in range(groups):
        part = values[:, of == g]
        low, high = part.min(1), part.max(1)
        if symmetric:
            scale = np.abs(part).max(1) / (2 ** (bits - 1) - 0.5)
            zero = np.full(rows, 2 ** (bits - 1))
        else:
            scale = (np.maximum(high, 0) - np.minimum(low, 0)) / top
            zero = np.clip(np.round(-np.minimum(low, 0) / scale), 1, top)
        scales[:, g] = np.float16(scale)
        zeros[:, g] = zero
        integers[:, of == g] = np.clip(np.round(part / scales[:, g : g + 1]) + zeros[:, g : g + 1], 0, top)
    found = (integers - zeros[:, of]) * scales[:, of]
    return integers, torch.tensor(scales, dtype=torch.float16), zeros, torch.tensor(found, dtype=torch.float32), of


def awq(weight: torch.Tensor, group: int = 32) -> Packed:
    integers, scales, zeros, values, _ = affine(weight, 4, group, False)

    def words(table: np.ndarray[Any, Any]) -> torch.Tensor:  # [x, M] -> [x, M / 8]
        ordered = table.reshape(len(table), -1, 8)[..., list(AWQ_ORDER)].reshape(len(table), -1)
        return rows_of_words(ordered, 4)

    return {"qweight": words(integers.T), "qzeros": words(zeros.T), "scales": scales.T.contiguous()}, values


def gptq(
    weight: torch.Tensor, bits: int = 4, group: int = 32, symmetric: bool = True, v2: bool = False, act: bool = False
) -> Packed:
    columns = weight.shape[1]
    order = None
    if act:
        order = np.random.default_rng(1).permutation(np.arange(columns) // group)
    integers, scales, zeros, values, of = affine(weight, bits, group, symmetric, order)
    return {
        "qweight": rows_of_words(integers, bits).T.contiguous(),
        "qzeros": rows_of_words(zeros.T - (0 if v2 else 1), bits),
        "scales": scales.T.contiguous(),
        "g_idx": torch.tensor(of, dtype=torch.int32),
    }, values


def packed_ints(weight: torch.Tensor, bits: int = 4, group: int = 32, symmetric: bool = True) -> Packed:
    integers, scales, zeros, values, _ = affine(weight, bits, group, symmetric)
    out = {
        "weight_packed": rows_of_words(integers, bits),
        "weight_scale": scales,
        "weight_shape": torch.tensor(weight.shape),
    }
    if not symmetric:
        out["weight_zero_point"] = rows_of_words(zeros.T, bits).T.contiguous()
    return out, values


def int8_rows(weight: torch.Tensor) -> Packed:
    scale = weight.abs().amax(1, keepdim=True) / 127
    integers = (weight / scale).round()
    return {"weight": integers.to(torch.int8), "weight_scale": scale}, integers * scale


def float8(weight: torch.Tensor, by: str, scale_name: str = "weight_scale") -> Packed:
    """One scale by "tensor", "row", or "block" of 128 x 128."""
    rows, columns = weight.shape
    high, wide = {"tensor": (rows, columns), "row": (1, columns), "block": (128, 128)}[by]
    scale = torch.zeros(-(-rows // high), -(-columns // wide))
    codes, values = torch.zeros(weight.shape), torch.zeros(weight.shape)
    for m in range(scale.shape[0]):
        for n in range(scale.shape[1]):
            tile = slice(m * high, (m + 1) * high), slice(n * wide, (n + 1) * wide)
            scale[m, n] = weight[tile].abs().max() / 448
            codes[tile] = (weight[tile] / scale[m, n]).clamp(-448, 448).to(torch.float8_e4m3fn).float()
            values[tile] = codes[tile] * scale[m, n]
    stored = scale.reshape(()) if by == "tensor" else scale
    return {"weight": codes.to(torch.float8_e4m3fn), scale_name: stored.clone()}, values


def halves(codes: np.ndarray[Any, Any]) -> torch.Tensor:
    """Two codes a byte, the lower half first."""
    return torch.tensor(codes[..., 0::2] + 16 * codes[..., 1::2], dtype=torch.uint8)


def nearest_e2m1(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.abs(x[..., None] - np.array(E2M1)).argmin(-1)


def mxfp4(weight: torch.Tensor) -> tuple[np.ndarray[Any, Any], torch.Tensor, torch.Tensor]:
    """Codes and exponents (bytes) of groups of 32 of the last axis, and the values."""
    blocks = weight.double().numpy().reshape(*weight.shape[:-1], -1, 32)
    exponent = np.floor(np.log2(np.abs(blocks).max(-1))).astype(int) - 2
    scale = 2.0**exponent
    codes = nearest_e2m1(blocks / scale[..., None])
    values = np.array(E2M1)[codes] * scale[..., None]
    wide = weight.shape
    return (
        codes.reshape(wide),
        torch.tensor(exponent + 127, dtype=torch.uint8),
        torch.tensor(values.reshape(wide)).float(),
    )


def mxfp4_matrix(weight: torch.Tensor) -> Packed:
    codes, exponents, values = mxfp4(weight)
    return {"weight_packed": halves(codes), "weight_scale": exponents}, values


def mxfp4_stack(name: str, tensor: torch.Tensor) -> Packed | None:
    """gpt-oss's stacks of experts [E, N, M]."""
    if not name.endswith(("gate_up_proj", "down_proj")):
        return None
    codes, exponents, values = mxfp4(tensor.transpose(1, 2).contiguous())
    blocks = halves(codes).unflatten(-1, (-1, 16))
    return {"_blocks": blocks, "_scales": exponents}, values.transpose(1, 2).contiguous()


def mxfp8_matrix(weight: torch.Tensor) -> Packed:
    blocks = weight.unflatten(1, (-1, 32))
    exponent = torch.floor(torch.log2(blocks.abs().amax(-1))) - 8
    codes = (blocks / 2 ** exponent.unsqueeze(-1)).clamp(-448, 448).to(torch.float8_e4m3fn)
    values = (codes.float() * 2 ** exponent.unsqueeze(-1)).flatten(1)
    return {"weight": codes.flatten(1), "weight_scale": (exponent + 127).to(torch.uint8)}, values


def nvfp4(weight: torch.Tensor, modelopt: bool) -> Packed:
    whole = weight.abs().max() / (6 * 448)  # what every scale is multiplied with
    stated = whole if modelopt else 1 / whole
    blocks = weight.unflatten(1, (-1, 16))
    scale = (blocks.abs().amax(-1) / 6 / whole).to(torch.float8_e4m3fn)
    full = scale.float() * stated if modelopt else scale.float() / stated
    codes = nearest_e2m1((blocks / full.clamp_min(1e-20).unsqueeze(-1)).numpy()).reshape(weight.shape)
    values = torch.tensor(np.array(E2M1)[codes]).float() * full.repeat_interleave(16, 1)
    if modelopt:
        return {"weight": halves(codes), "weight_scale": scale, "weight_scale_2": stated}, values
    return {"weight_packed": halves(codes), "weight_scale": scale, "weight_global_scale": stated.reshape(1)}, values


def table4(weight: torch.Tensor, kind: str = "nf4", nested: bool = False, block: int = 64) -> Packed:
    """bitsandbytes' blocks of the flat matrix over 16 values, the upper half of a byte first."""
    levels = np.sort(np.random.default_rng(3).uniform(-1, 1, 16)).astype(np.float32)
    levels[0], levels[-1] = -1, 1
    flat = weight.numpy().reshape(-1)
    peaks = np.abs(np.pad(flat, (0, -len(flat) % block)).reshape(-1, block)).max(1).astype(np.float32)
    extra: dict[str, torch.Tensor] = {}
    state: dict[str, Any] = {"quant_type": kind, "blocksize": block, "dtype": "bfloat16", "shape": list(weight.shape)}
    if nested:
        offset = float(np.float32(peaks.mean()))
        outer = np.array([np.abs(peaks[i : i + 256] - offset).max() for i in range(0, len(peaks), 256)], np.float32)
        table = np.linspace(-1, 1, 256).astype(np.float32)
        index = np.abs((peaks - offset)[:, None] / outer[np.arange(len(peaks)) // 256][:, None] - table).argmin(1)
        peaks = table[index] * outer[np.arange(len(peaks)) // 256] + np.float32(offset)
        state |= {"nested_blocksize": 256, "nested_offset": offset}
        extra = {"weight.nested_absmax": torch.tensor(outer), "weight.nested_quant_map": torch.tensor(table)}
        extra["weight.absmax"] = torch.tensor(index, dtype=torch.uint8)
    scale = peaks[np.arange(len(flat)) // block]
    codes = np.abs(flat[:, None] / scale[:, None] - levels).argmin(1)
    state_bytes = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return {
        "weight": torch.tensor(codes[0::2] * 16 + codes[1::2], dtype=torch.uint8).reshape(-1, 1),
        "weight.absmax": torch.tensor(peaks),
        "weight.quant_map": torch.tensor(levels),
        f"weight.quant_state.bitsandbytes__{kind}": state_bytes,
        **extra,
    }, torch.tensor(levels[codes] * scale).reshape(weight.shape)


def int8_table(weight: torch.Tensor) -> Packed:
    peak = weight.abs().amax(1)
    integers = (weight / peak[:, None] * 127).round()
    out = {"weight": integers.to(torch.int8), "SCB": peak, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    return out, integers * (peak / 127)[:, None]


def quantised(
    path: Path, target: Path, pack: Callable[[torch.Tensor], Packed] | Callable[[str, torch.Tensor], Packed | None],
    config: dict[str, Any], *, named: bool = False,
) -> tuple[Path, Path]:  # fmt: skip
    """A checkpoint whose projections are packed, and the plain one of the same values.

    `named`: `pack` is given the tensor's name too, and None of it leaves the tensor plain.
    """
    from safetensors.torch import load_file, save_file

    plain: dict[str, torch.Tensor] = {}
    packed: dict[str, torch.Tensor] = {}
    anything: Any = pack
    for name, tensor in load_file(path / "model.safetensors").items():
        taken = named or name.endswith(("_proj.weight", ".w1.weight", ".w2.weight", ".w3.weight"))
        made = (anything(name, tensor) if named else anything(tensor)) if taken else None
        plain[name] = tensor if made is None else made[1]
        if made is None:
            packed[name] = tensor
        else:
            stem = name.removesuffix("weight") if name.endswith(".weight") else name
            packed |= {stem + part: found.contiguous() for part, found in made[0].items()}
    settings = json.loads((path / "config.json").read_text())
    for folder, tensors, more in (("plain", plain, {}), ("packed", packed, {"quantization_config": config})):
        (target / folder).mkdir(parents=True)
        save_file(tensors, target / folder / "model.safetensors")
        (target / folder / "config.json").write_text(json.dumps({**settings, **more}))
        for file in path.glob("tokenizer*"):
            (target / folder / file.name).write_bytes(file.read_bytes())
    return target / "packed", target / "plain"
