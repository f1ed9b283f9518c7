"""Storage of what a model keeps of its tokens. Who owns which page or slot is the cache manager's business.

Legend: K kv heads, S page size, D head size. Page 0, and slot 0, of every group is scratch: padding rows of a step
write there, and the allocators never hand it out.
"""

from __future__ import annotations

import mmap
from typing import TYPE_CHECKING, Any

import torch

from phloem.core.memory import groups_of
from phloem.kvcache.layouts import layout_of
from phloem.kvcache.layouts._storage import Tensors
from phloem.platforms._facts import in_host_memory
from phloem.utils import memory as system

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from torch import Tensor

    from phloem.core.memory import MemorySpec
    from phloem.kvcache.routes import Routes


def fewest_pages(memory: Sequence[MemorySpec], page_size: int) -> list[int]:
    """Of each group as many pages as a step on dummy inputs needs: scratch, and one beside it or those of one slot."""
    groups = groups_of(memory)
    return [1 + group.pages_each(page_size) if group.kind == "cross" else 2 for group in groups]


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
    """The memory of all layers, by pool index: `memory[i]` lies in `keys[i]` and `values[i]`, or in `states[i]`.

    `keys[i]`, `values[i]`: `[pages, K, S, D]`, see `layouts/`; for a state an empty tensor. `states[i]`: tensors
    `[slots, *shape]`; for pages none. Pages are those of the layer's group: `groups[group_of[i]]`, of which there are
    `num_pages[group_of[i]]`. `scales[i]`, where there are any: what a backend divides by when it writes, and
    multiplies with when it reads.
    """

    def __init__(
        self,
        memory: Sequence[MemorySpec],
        num_pages: Sequence[int],
        page_size: int,
        dtype: torch.dtype,
        device: torch.device,
        scales: Mapping[int, tuple[Sequence[float], Sequence[float]]] | None = None,
        own: Collection[int] | None = None,
    ) -> None:
        """`own`: the layers of this rank, by pool index; None: all. The others have no storage here."""
        self.memory = tuple(memory)
        self.groups = groups_of(memory)
        if len(num_pages) != len(self.groups):
            raise ValueError(f"{len(self.groups)} groups of memory, but pages for {len(num_pages)}")
        if any(count < 2 for count in num_pages) or page_size < 1:
            raise ValueError(f"a pool needs 2 pages of 1 token at least, not {list(num_pages)} of {page_size}")
        self.num_pages, self.page_size = tuple(num_pages), page_size
        self.dtype, self.device = dtype, device
        self.group_of = {layer: number for number, group in enumerate(self.groups) for layer in group.layers}
        self.scales = {layer: KVScales(k, v, device) for layer, (k, v) in (scales or {}).items()}
        none = torch.empty(0, dtype=dtype, device=device)
        made = [
            layout_of(spec, dtype).make(num_pages[self.group_of[layer]], page_size, device)
            if own is None or layer in own
            else Tensors(())
            for layer, spec in enumerate(memory)
        ]
        self.routes: Routes | None = None  # which experts computed the tokens, where that is asked for
        self._stored: list[Tensor] = [tensor for layer in made for tensor in layer.stored]
        self._of_layer = [layer.stored for layer in made]
        self.keys: list[Tensor] = [layer.keys if layer.keys is not None else none for layer in made]
        self.values: list[Tensor] = [layer.values if layer.values is not None else none for layer in made]
        self.states: list[tuple[Tensor, ...]] = [layer.states for layer in made]

    def move(self, place: Callable[[Tensor], Any]) -> list[Any]:
        """Keep everything where `place` says instead, which gives what stands for a tensor there: all of it, in a fixed
        order. No tensor has memory here then."""
        nothing: tuple[Tensor, ...] = ()
        self._stored, self._of_layer = [], [nothing] * len(self.memory)
        pairs = zip(self.keys, self.values, strict=True)
        # Values that are a view of keys, of latents, are nobody's own.
        moved = [(place(k), place(v[:0] if v.data_ptr() == k.data_ptr() else v)) for k, v in pairs]
        self.keys, self.values = [keys for keys, _ in moved], [values for _, values in moved]
        self.states = [tuple(place(tensor) for tensor in states) for states in self.states]
        return [*self.keys, *self.values, *(tensor for states in self.states for tensor in states)]

    def make_resident(self, limit: int, stopped: Callable[[], bool]) -> int:
        """Give the first pages their memory before they are wanted: at most `limit` bytes; gives how many.

        The system clears memory when it is first touched, which on a virtual machine can cost more than computing what
        is then written there. For a thread in the background, on host memory; elsewhere nothing happens.
        """
        if not in_host_memory(self.device):
            return 0
        done = 0
        for offset in range(0, max((tensor.nbytes for tensor in self._stored), default=0), system.HUGE):
            for tensor in self._stored:
                count = min(system.HUGE, tensor.nbytes - offset) // mmap.PAGESIZE * mmap.PAGESIZE
                if count <= 0:
                    continue
                if stopped() or done + count > limit or not system.populate(tensor.data_ptr() + offset, count):
                    return done
                done += count
        return done

    def discard(self) -> int:
        """Give all of the memory back to the system, which gives zeros when it is touched again; bytes. For nobody's
        pages, in host memory."""
        return system.discard((tensor.data_ptr(), tensor.nbytes) for tensor in self._stored)

    def stored(self, group: int, first: int = 0) -> list[Tensor]:
        """All that has memory of its own of a group's layers, in their order: each [pages, ...], or [slots, ...].
        `first`: of layers from this pool index on."""
        layers = (layer for layer in self.groups[group].layers if layer >= first)
        return [tensor for layer in layers for tensor in self._of_layer[layer]]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._stored)

    @staticmethod
    def bytes_per_token(
        memory: Sequence[MemorySpec], dtype: torch.dtype, stages: Sequence[Collection[int]] = ()
    ) -> tuple[int, ...]:
        """For each group what one token's pages take over its layers, or of states one slot. `stages`: the layers of
        each, by pool index; the most that one of them has counts."""
        parts = stages or (range(len(memory)),)
        return tuple(
            max(sum(layout_of(memory[layer], dtype).bytes for layer in group.layers if layer in part) for part in parts)
            for group in groups_of(memory)
        )
