"""What a model keeps of the tokens it has seen: a spec per layer, and the groups of layers whose memory lives alike.

A model gives one `MemorySpec` for each pool index that its layers use (`Model.memory`). Layers that keep tokens equally
long form a *group*: they share page ids, a page table, an allocator and the pages of a lease. How a page of a layer is
laid out, and how many bytes it takes, is the layout's business (`kvcache/layouts/`), not the group's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, slots=True)
class Paged:
    """Keys and values of every token, by page. `window` 0: a token is read for ever; else by the next `window` - 1."""

    kv_heads: int
    key_size: int
    value_size: int
    window: int = 0


@dataclass(frozen=True, slots=True)
class Latent:
    """One compressed vector of every token and its rotated part, by page; values are a view of it (MLA)."""

    rank: int
    rope: int
    window: int = 0


@dataclass(frozen=True, slots=True)
class State:
    """Tensors of fixed size that take in every token: a recurrent layer's. `tensors`: shape and torch dtype name."""

    tensors: tuple[tuple[tuple[int, ...], str], ...]


@dataclass(frozen=True, slots=True)
class Cross:
    """Keys and values of what a request brings beside its tokens (the states of its audio): so many positions, written
    once when it enters a slot of the runner, and read by all of its tokens."""

    kv_heads: int
    key_size: int
    value_size: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Kept:
    """One vector of every token, by page, that another model reads later: a state of the model, for a head that drafts.
    `size` is even; `kind`: the torch dtype's name."""

    size: int
    kind: str
    window: int = 0


MemorySpec = Paged | Latent | State | Cross | Kept


@dataclass(frozen=True, slots=True)
class Group:
    """Layers whose memory lives and dies together.

    `pages`: a table row lists page ids by position; with a window, ids of pages that lie wholly behind it are 0.
    `state`: a table row has two ids: the slot of state that a step reads, and the one that it writes. What was read
    stays as it was, so that a step can be undone and a slot can be a snapshot that several requests read.
    `cross`: the runner's alone, with no table in a batch: each of its slots has pages of its own (`pages_each`).
    """

    kind: Literal["pages", "state", "cross"]
    window: int  # tokens; 0: all are kept
    layers: tuple[int, ...]  # pool indexes
    tokens: int = 0  # of `cross`: positions of each slot

    def pages_each(self, page_size: int) -> int:
        """Of `cross`: pages of each slot. Slot s has those from 1 + s * pages_each on; 0 is scratch."""
        return -(-self.tokens // page_size)

    def first_needed(self, computed: int) -> int:
        """The first position that a token after `computed` computed ones may still read."""
        return max(0, computed - self.window + 1) if self.window else 0


def groups_of(memory: Sequence[MemorySpec]) -> tuple[Group, ...]:
    """The groups of a model: full pages first, then windows from the widest to the narrowest, then states, then what
    is read crosswise.

    Pool index i is `memory[i]`. A model without any paged layer has only the group of states.
    """
    pages: dict[int, list[int]] = {}
    states: list[int] = []
    crosses: dict[int, list[int]] = {}
    for index, spec in enumerate(memory):
        if isinstance(spec, State):
            states.append(index)
        elif isinstance(spec, Cross):
            crosses.setdefault(spec.tokens, []).append(index)
        else:
            pages.setdefault(spec.window, []).append(index)
    order = sorted(pages, key=lambda window: (window != 0, -window))
    found = [Group("pages", window, tuple(pages[window])) for window in order]
    found += [Group("state", 0, tuple(states))] if states else []
    return tuple(found + [Group("cross", 0, tuple(layers), tokens) for tokens, layers in crosses.items()])
