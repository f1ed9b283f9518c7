"""Blocks of GGUF files, and integers of 5 to 8 bits, in the form of `gemm_gguf.py`: the same numbers in another order.

Bytes go to the device as they are stored, and are put in order there, some rows at a time. The types are those of the
ggml project (`ggml-quants.c`, `gguf/quants.py`). Legend: R rows, B blocks, G groups of 32 features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from phloem.kernels.narrow import Narrow, narrow_of
from phloem.kernels.triton.gemm_gguf import GROUP, Run
from phloem.kernels.triton.weights import GroupedWeight

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from phloem.kernels.calls import WeightSource
    from phloem.kernels.narrow import Codes

WIDE = 256  # features of a block of the types with a K in their names
HALF = 16
_AT_ONCE = 1 << 24  # features of the rows that are put in order at a time
_HALF_SCALES = 128  # groups of fewer features have their scales in float16, where that holds them


@dataclass(frozen=True, slots=True)
class Read:
    """Some rows of blocks, read: codes uint8 [R, N], and the tables of `Run`."""

    codes: Tensor
    scale: Tensor
    least: Tensor | None = None
    outer: tuple[Tensor, ...] = ()  # float16 [R, N / 256] each


@dataclass(frozen=True, slots=True)
class Kind:
    """A GGUF type: how many bits its codes have here, what is subtracted, and how bytes uint8 [R, B, size] are read.

    `halves` of a group that share a scale; `tables`: the types of the scale and of what is least, None: none;
    `outer`: how many factors 256 features have.
    """

    bits: int
    offset: int
    read: Callable[[Tensor], Read]
    size: int  # bytes of a block
    halves: int = 2
    tables: tuple[torch.dtype, torch.dtype | None] = (torch.float16, None)
    outer: int = 0


def unfit(form: Narrow, columns: int) -> str | None:
    """Why no kernel multiplies such a matrix; None: one does."""
    if form.kind == "gguf":
        return None if form.stored in KINDS else f"{form.stored} has no kernel"
    if form.wide % HALF or columns % GROUP:
        return f"groups of {form.wide} of {columns} columns are no multiples of {HALF}, or those none of {GROUP}"
    return None


def made(parts: Sequence[WeightSource], dtype: torch.dtype, device: torch.device) -> GroupedWeight:
    """Matrices one behind the other; neighbours of one kind become one run."""
    forms = [form for part in parts if isinstance(form := narrow_of(part), Narrow)]
    columns, runs, begun = parts[0].shape[1], list[Run](), 0
    while begun < len(parts):
        end = begun + 1
        while end < len(parts) and forms[end] == forms[begun]:
            end += 1
        run = empty(forms[begun], sum(part.shape[0] for part in parts[begun:end]), columns, device)
        start = 0
        for part in parts[begun:end] if device.type != "meta" else ():
            given: Any = part
            _fill(run, forms[begun], start, given.codes())
            start += part.shape[0]
        runs.append(run)
        begun = end
    return GroupedWeight(tuple(runs), dtype)


def empty(form: Narrow, rows: int, columns: int, device: torch.device) -> Run:
    """A run of so many rows, to be filled."""
    if form.kind == "gguf":
        kind = KINDS[form.stored]
        bits, offset, (scales, least), outer = kind.bits, kind.offset, kind.tables, kind.outer
        wide = HALF * kind.halves
    else:
        bits, offset, outer, wide = 8, 0 if form.zeros else 128, 0, form.wide
        scales = torch.float16 if form.half and wide < _HALF_SCALES else torch.float32
        least = torch.float16 if form.zeros else None

    def table(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    high = {5: torch.uint8, 6: torch.int16}.get(bits)
    return Run(
        bits,
        table(torch.int32, rows, columns // (4 if bits == 8 else 8)),
        table(scales, rows, columns // wide),
        None if high is None else table(high, rows, columns // 8),
        None if least is None else table(least, rows, columns // wide),
        table(torch.float16, outer, rows, columns // WIDE) if outer else None,
        offset,
        form.kind != "gguf" and form.zeros,
    )


def _fill(run: Run, form: Narrow, start: int, given: Codes) -> None:
    """Rows from `start` on."""
    step = max(1, _AT_ONCE // run.features)
    for first in range(0, len(given.values), step):
        some = slice(first, first + step)
        values = given.values[some].to(run.codes.device)
        if form.kind == "gguf":
            kind = KINDS[form.stored]
            read = kind.read(values.unflatten(1, (-1, kind.size)))
        else:
            zero = None if given.zero is None else given.zero[some]
            read = Read(values, given.scale[some], zero)
        _put(run, slice(start + first, start + first + len(values)), read)


def _put(run: Run, rows: slice, read: Read) -> None:
    codes, high = ordered(read.codes, run.bits)
    run.codes[rows] = codes
    run.scale[rows] = read.scale
    if run.high is not None and high is not None:
        run.high[rows] = high
    if run.least is not None and read.least is not None:
        run.least[rows] = read.least
    if run.outer is not None:
        for table, values in zip(run.outer, read.outer, strict=True):
            table[rows] = values


def ordered(codes_RN: Tensor, bits: int) -> tuple[Tensor, Tensor | None]:
    """Codes, uint8, in the order of `gemm_gguf.py`: words, and what has the bits above the fourth."""
    if bits == 8:
        halves = codes_RN.unflatten(1, (-1, 4, 4)).transpose(2, 3)  # [R, halves, w, place]
        return halves.flatten(1).contiguous().view(torch.int32), None
    groups = codes_RN.unflatten(1, (-1, 8, 4)).transpose(2, 3)  # [R, G, w, place]
    low = groups & 15
    words = (low[..., ::2] | low[..., 1::2] << 4).flatten(1).contiguous().view(torch.int32)
    if bits == 4:
        return words, None
    wide, above = bits - 4, (groups >> 4).to(torch.int32)
    shifts = torch.arange(0, 8 * wide, wide, dtype=torch.int32, device=codes_RN.device)
    joined = (above << shifts).sum(-1, dtype=torch.int32).flatten(1)
    return words, joined.to(torch.uint8 if bits == 5 else torch.int16)


# The types, block by block. All of `raw` are uint8 [R, B, bytes].


def _halves(raw: Tensor, at: int, count: int = 1) -> Tensor:
    """float16 [R, B * count]."""
    return raw[..., at : at + 2 * count].contiguous().view(torch.float16).flatten(1)


def _nibbles(raw: Tensor, width: int) -> Tensor:
    """uint8 [R, B, 2 * bytes]: of each `width` bytes the lower halves, then the upper ones."""
    runs = raw.unflatten(2, (-1, width))
    return torch.stack((runs & 15, runs >> 4), 3).flatten(2)


def _bits(raw: Tensor, wide: int) -> Tensor:
    """uint8 [R, B, 8 / wide, bytes]: of each byte the lowest `wide` bits, then the next."""
    shifts = torch.arange(0, 8, wide, dtype=torch.uint8, device=raw.device)
    return (raw.unsqueeze(2) >> shifts[:, None]) & ((1 << wide) - 1)


def _q4(raw: Tensor, least: bool) -> Read:
    at = 4 if least else 2
    codes = _nibbles(raw[..., at:], 16)
    return Read(codes.flatten(1), _halves(raw, 0), -_halves(raw, 2) if least else None)


def _q5(raw: Tensor, least: bool) -> Read:
    at = 4 if least else 2
    fifth = _bits(raw[..., at : at + 4], 1).transpose(2, 3).flatten(2)  # bit after bit of byte after byte
    codes = _nibbles(raw[..., at + 4 :], 16) | fifth << 4
    return Read(codes.flatten(1), _halves(raw, 0), -_halves(raw, 2) if least else None)


def _q8(raw: Tensor) -> Read:
    return Read((raw[..., 2:] ^ 128).flatten(1), _halves(raw, 0))


def _steps(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Six bits each of eight scales and eight minima, of 12 bytes: uint8 [R, B * 8] twice."""
    low, middle, top = packed.split(4, 2)
    scale = torch.cat((low & 63, (top & 15) | (low >> 6) << 4), 2)
    least = torch.cat((middle & 63, top >> 4 | (middle >> 6) << 4), 2)
    return scale.flatten(1), least.flatten(1)


def _q4_k(raw: Tensor) -> Read:
    scale, least = _steps(raw[..., 4:16])
    return Read(_nibbles(raw[..., 16:], 32).flatten(1), scale, least, (_halves(raw, 0), _halves(raw, 2)))


def _q5_k(raw: Tensor) -> Read:
    scale, least = _steps(raw[..., 4:16])
    codes = _nibbles(raw[..., 48:], 32) | _bits(raw[..., 16:48], 1).flatten(2) << 4
    return Read(codes.flatten(1), scale, least, (_halves(raw, 0), _halves(raw, 2)))


def _q6_k(raw: Tensor) -> Read:
    low = _nibbles(raw[..., :128], 64)
    high = torch.cat([_bits(part, 2).flatten(2) for part in raw[..., 128:192].split(32, 2)], 2)
    scale = raw[..., 192:208].flatten(1).contiguous().view(torch.int8)
    return Read((low | high << 4).flatten(1), scale, None, (_halves(raw, 208),))


def _q2_k(raw: Tensor) -> Read:
    codes = torch.cat([_bits(part, 2).flatten(2) for part in raw[..., 16:80].split(32, 2)], 2)
    steps = raw[..., :16].flatten(1)
    return Read(codes.flatten(1), steps & 15, steps >> 4, (_halves(raw, 80), _halves(raw, 82)))


def _q3_k(raw: Tensor) -> Read:
    low = torch.cat([_bits(part, 2).flatten(2) for part in raw[..., 32:96].split(32, 2)], 2)
    third = _bits(raw[..., :32], 1).flatten(2)
    four, two = _nibbles(raw[..., 96:104], 8), _bits(raw[..., 104:108], 2).flatten(2)
    scale = ((four | two << 4).to(torch.int8) - 32).flatten(1)
    return Read((low | third << 2).flatten(1), scale, None, (_halves(raw, 108),))


_NONLINEAR = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)  # values of IQ4 codes


def _looked_up(codes: Tensor) -> Tensor:
    return (torch.tensor(_NONLINEAR, device=codes.device) + 128).to(torch.uint8)[codes.int()]


def _iq4_nl(raw: Tensor) -> Read:
    return Read(_looked_up(_nibbles(raw[..., 2:], 16)).flatten(1), _halves(raw, 0))


def _iq4_xs(raw: Tensor) -> Read:
    low = torch.stack((raw[..., 4:8] & 15, raw[..., 4:8] >> 4), 3).flatten(2)
    high = _bits(raw[..., 2:4], 2).transpose(2, 3).flatten(2)
    scale = ((low | high << 4).to(torch.int8) - 32).flatten(1)
    return Read(_looked_up(_nibbles(raw[..., 8:], 16)).flatten(1), scale, None, (_halves(raw, 0),))


_BYTES = (torch.uint8, torch.uint8)
_SIGNED = (torch.int8, None)
_TWO = (torch.float16, torch.float16)
KINDS: dict[str, Kind] = {
    "Q4_0": Kind(4, 8, lambda raw: _q4(raw, False), 18),
    "Q4_1": Kind(4, 0, lambda raw: _q4(raw, True), 20, tables=_TWO),
    "Q5_0": Kind(5, 16, lambda raw: _q5(raw, False), 22),
    "Q5_1": Kind(5, 0, lambda raw: _q5(raw, True), 24, tables=_TWO),
    "Q8_0": Kind(8, 128, _q8, 34),
    "Q2_K": Kind(4, 0, _q2_k, 84, 1, _BYTES, 2),
    "Q3_K": Kind(4, 4, _q3_k, 110, 1, _SIGNED, 1),
    "Q4_K": Kind(4, 0, _q4_k, 144, 2, _BYTES, 2),
    "Q5_K": Kind(5, 0, _q5_k, 176, 2, _BYTES, 2),
    "Q6_K": Kind(6, 32, _q6_k, 210, 1, _SIGNED, 1),
    "IQ4_NL": Kind(8, 128, _iq4_nl, 18),
    "IQ4_XS": Kind(8, 128, _iq4_xs, 136, 2, _SIGNED, 1),
}
