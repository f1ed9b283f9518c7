"""Numbers of few bits out of the words that files keep them in. Legend: R rows, W words, C numbers of a row."""

from __future__ import annotations

import torch
from torch import Tensor

from phloem.core.errors import ModelLoadError

# Twice the values of e2m1, the 4-bit float: 1 bit sign, 2 exponent, 1 mantissa (OCP Microscaling, 2023).
TWICE_E2M1 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)


def unpack(words_RW: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` numbers of each row, uint8 [R, C]: a stream of bits, lowest first, over words of any size."""
    if bits in (2, 4, 8):
        # Copied: a row of one word may claim to be contiguous with strides that no view of its bytes takes.
        octets = (
            torch.empty(words_RW.shape, dtype=words_RW.dtype, device=words_RW.device).copy_(words_RW).view(torch.uint8)
        )
        if bits < 8:
            places = range(0, 8, bits)
            octets = torch.stack([octets >> at & (1 << bits) - 1 for at in places], -1).flatten(1)
        return octets[:, :count]
    # A number may lie across two words: both are laid side by side, and shifted.
    stream = words_RW.to(torch.int64) & 0xFFFFFFFF
    first = torch.arange(count, device=words_RW.device) * bits
    low = stream[:, first // 32]
    high = stream[:, (first // 32 + 1).clamp_max(stream.shape[1] - 1)]
    return ((low | high << 32) >> (first % 32) & (1 << bits) - 1).to(torch.uint8)


def words_for(count: int, bits: int) -> int:
    """32-bit words that hold so many numbers."""
    return -(-count * bits // 32)


def fitting_bits(words: int, count: int, known: tuple[int, ...], name: str) -> int:
    """How many bits each of `count` numbers has that take `words` words; of several, the first of `known`."""
    found = [bits for bits in (*known, 2, 3, 4, 5, 6, 7, 8) if words_for(count, bits) == words]
    if not found:
        raise ModelLoadError(f"{name}: {words} words of 32 bits do not hold {count} numbers of 2 to 8 bits")
    return found[0]


def e2m1_of(twice: Tensor) -> Tensor:
    """Codes of 4-bit floats, uint8, of twice their values, int8; zero has one."""
    table = torch.tensor([TWICE_E2M1.index(at - 12) if at - 12 in TWICE_E2M1 else 0 for at in range(25)])
    return table.to(twice.device, torch.uint8)[twice.int() + 12]


def twice_e2m1(packed_RB: Tensor) -> Tensor:
    """Twice the values of 4-bit floats, two a byte, the lower half first: int8 [R, 2 B]."""
    table = torch.tensor(TWICE_E2M1, dtype=torch.int8, device=packed_RB.device)
    return table[torch.stack((packed_RB & 15, packed_RB >> 4), -1).flatten(1).int()]
