"""Experts that come to this rank while it serves: read beside those that are there, then put in their place."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import Tensor

from phloem.layers.moe import SparseMLP
from phloem.layers.weight import Layer
from phloem.models._index import WeightIndex, open_sources

if TYPE_CHECKING:
    from collections.abc import Iterator

    from phloem.checkpoint.describe import Checkpoint
    from phloem.distributed.balance import Ranks
    from phloem.layers.weight import Weight
    from phloem.models._common import Decoder


@dataclass(frozen=True)
class Arrived:
    """Experts of one layer, read and not yet in use."""

    ranks: Ranks
    own: list[int]  # this rank's, in the order of its slots
    read: list[int]  # those that were read
    pairs: list[tuple[Weight, Weight, Weight]]  # (in use, names of its slots from now on, what was read)


class ExpertMoves:
    """Reads and places experts of a model whose layers have a `Spread`. For between two steps."""

    def __init__(self, model: Decoder, checkpoint: Checkpoint) -> None:
        self._model, self._checkpoint = model, checkpoint
        self.blocks = [block for block in _sparse(model) if block.spread is not None]

    def read(self, layer: int, ranks: Ranks) -> Arrived:
        """What this rank needs, and does not have, for experts to lie so. Nothing is changed.

        Raises:
            ModelLoadError, OSError, MemoryError: it cannot be read.
        """
        block, index = self.blocks[layer], self._model.index
        spread = block.spread
        assert spread is not None
        own = ranks[spread.rank]
        old = [block.gate_up, block.down, *(block.biases or ())]
        # A tensor takes single experts in; what a table has packed is packed anew, all of it.
        plain = all(isinstance(weight.value, Tensor) for weight in old)
        read = [expert for expert in own if expert not in spread.own] if plain else list(own)
        if own == spread.own:
            return Arrived(ranks, own, [], [])
        named, fresh = _flat(block, own), _flat(block, read)
        if read:
            # What brought weights to the device in one go has ended.
            few = WeightIndex(fresh, replace(index.ctx, stager=None), index.embedding)
            sources, _ = open_sources(self._checkpoint, few, self._model.checkpoint_name, whole=False)
            few.pull(sources, str(self._checkpoint.path), None)
            if self._checkpoint.gguf is not None:
                self._checkpoint.gguf.release()
        return Arrived(ranks, own, read, list(zip(old, named, fresh, strict=True)))

    def install(self, layer: int, arrived: Arrived) -> None:
        """Use it from the next step on."""
        spread = self.blocks[layer].spread
        assert spread is not None
        before = spread.own
        for weight, named, fresh in arrived.pairs:
            if isinstance(weight.value, Tensor):
                weight.value = _woven(weight.value, fresh.value, before, arrived)
            else:
                weight.value = fresh.value
            self._model.index.rename(weight, named)
        spread.put(arrived.ranks)


def _woven(kept: Tensor, fresh: Tensor | None, before: list[int], arrived: Arrived) -> Tensor:
    """Rows of all of a rank's experts, of those that stay and those that were read."""
    old = dict(zip(before, kept.chunk(len(before)), strict=True))
    new = {} if fresh is None else dict(zip(arrived.read, fresh.chunk(len(arrived.read)), strict=True))
    for slot, expert in enumerate(arrived.own):
        if before[slot] != expert and expert not in new:  # it changes its slot: read before it is written over
            new[expert] = old[expert].clone()
    rows = len(kept) // len(before)
    for slot, expert in enumerate(arrived.own):
        if before[slot] != expert:
            kept[slot * rows : (slot + 1) * rows].copy_(new[expert])
    return kept


def _flat(block: SparseMLP, experts: list[int]) -> list[Weight]:
    gate_up, down, biases = block.slots(experts)
    return [gate_up, down, *(biases or ())]


def _sparse(layer: object) -> Iterator[SparseMLP]:
    """All sparse blocks below a layer, in the order in which they were built."""
    found = {id(block): block for block in _below(layer)}
    yield from sorted(found.values(), key=lambda block: -1 if block.spread is None else block.spread.number)


def _below(value: object) -> Iterator[SparseMLP]:
    if isinstance(value, SparseMLP):
        yield value
    elif isinstance(value, Layer):
        for item in vars(value).values():
            yield from _below(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _below(item)
