"""Storage of keys and values, by page. Who owns which page is the cache manager's business, not the pool's.

Legend: K kv heads, S page size, D head size. Page 0 is scratch: padding rows of a step write there, and the allocator
never hands it out.
"""

from __future__ import annotations

import math
import mmap
from typing import TYPE_CHECKING

import torch

from phloem.core.memory import Paged, State, groups_of
from phloem.utils import memory

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from phloem.core.memory import MemorySpec

SCALE_BYTES = 4  # an int8 entry has a float32 scale


def entry_size(head_size: int, dtype: torch.dtype) -> int:
    """Elements that one head's key or value takes in a cache of this type."""
    return head_size + SCALE_BYTES if dtype == torch.int8 else head_size


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros; in host memory straight from the system, so that a page costs nothing before it is used."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(memory.zeros(math.prod(shape) * dtype.itemsize)).view(dtype).view(shape)


class KVScales:
    """What one layer's cached keys and values stand for: the number stored times this one.

    One number each, or one per kv head; as float32 tensors on the device, `[1]` or `[K]`, and as numbers.
    """

    def __init__(self, k: Sequence[float], v: Sequence[float], device: torch.device) -> None:
        if len(k) != len(v):
            raise ValueError(f"{len(k)} scales for keys, {len(v)} for values")
        self.k_values, self.v_values = tuple(k), tuple(v)
        self.k = torch.tensor(self.k_values, dtype=torch.float32, device=device)
        self.v = torch.tensor(self.v_values, dtype=torch.float32, device=device)


class KVPool:
    """`keys[layer]` and `values[layer]`: `[pages, K, S, D]`; with int8, `[pages, K, S, D + 4]`: values and scales of a
    page, in the order that csrc/cpu/int8_page.h describes.

    `scales[layer]`, where there are any: what a backend divides by when it writes, and multiplies with when it reads.

    Starts as zeros, because a gathered page may be read where it is masked, and 0 times NaN is NaN.
    """

    def __init__(
        self,
        memory: Sequence[MemorySpec],
        num_pages: Sequence[int],
        page_size: int,
        dtype: torch.dtype,
        device: torch.device,
        scales: Mapping[int, tuple[Sequence[float], Sequence[float]]] | None = None,
    ) -> None:
        self.groups = groups_of(memory)
        if len(num_pages) != len(self.groups) or min(num_pages) < 2 or page_size < 1:
            raise ValueError(
                f"{len(self.groups)} groups need 2 pages of 1 token at least, not {num_pages} of {page_size}"
            )
        self.num_pages, self.page_size = tuple(num_pages), page_size
        self.dtype, self.device = dtype, device
        self.group_of = {layer: place for place, group in enumerate(self.groups) for layer in group.layers}
        self.scales = {layer: KVScales(k, v, device) for layer, (k, v) in (scales or {}).items()}
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        self.states: dict[int, tuple[Tensor, ...]] = {}
        for layer, spec in enumerate(memory):
            count = num_pages[self.group_of[layer]]
            if isinstance(spec, State):
                made = [_zeros((count, *shape), getattr(torch, name), device) for shape, name in spec.tensors]
                self.states[layer] = tuple(made)
            elif isinstance(spec, Paged):
                for caches, size in ((self.keys, spec.key_size), (self.values, spec.value_size)):
                    caches[layer] = _zeros((count, spec.kv_heads, page_size, entry_size(size, dtype)), dtype, device)
            else:
                raise NotImplementedError("compressed vectors have no storage yet")

    def make_resident(self, limit: int, stopped: Callable[[], bool]) -> int:
        """Give the first pages their memory before they are wanted: at most `limit` bytes; gives how many.

        The system clears memory when it is first touched, which on a virtual machine can cost more than computing what
        is then written there. For a thread in the background, on host memory; elsewhere nothing happens.
        """
        if self.device.type != "cpu":
            return 0
        done, size = 0, min(cache.nbytes for cache in self._caches)
        for offset in range(0, size, memory.HUGE):
            for cache in self._caches:
                count = min(memory.HUGE, size - offset) // mmap.PAGESIZE * mmap.PAGESIZE
                if stopped() or done + count > limit or not memory.populate(cache.data_ptr() + offset, count):
                    return done
                done += count
        return done

    @property
    def _caches(self) -> list[Tensor]:
        return [*self.keys.values(), *self.values.values()]

    @property
    def nbytes(self) -> int:
        return sum(cache.nbytes for cache in self._caches)

    @staticmethod
    def bytes_per_token(memory: Sequence[MemorySpec], dtype: torch.dtype) -> int:
        """Bytes that one token's keys and values take over all layers."""
        paged = [spec for spec in memory if isinstance(spec, Paged)]
        entries = sum(
            spec.kv_heads * (entry_size(spec.key_size, dtype) + entry_size(spec.value_size, dtype)) for spec in paged
        )
        return entries * dtype.itemsize
