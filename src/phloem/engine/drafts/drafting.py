"""A model that drafts, within the runner's own steps: it is run before the step that verifies what it says.

Its memory lies behind the model's in the same pool: the same pages of the same tables, so that whatever gives, shares
or takes back pages does so for both. Drafts are drawn as the model's tokens are, by the request's own settings and
draw at each position: a model that drafts for itself says just what it will say.

Legend: R rows of the step, n rows of a pass, L positions whose next token is wanted, N hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, replace
from time import perf_counter
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from phloem.core.batch import DRAFTED, FROM_DEVICE, Batch
from phloem.engine.inputs import Step
from phloem.engine.sampling.sampler import sample
from phloem.engine.wanted import Wanted

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from phloem.core.memory import MemorySpec
    from phloem.core.resolve import Decision
    from phloem.engine.drafts.branches import TreeShape
    from phloem.engine.forward import Forward
    from phloem.engine.sampling.slots import Slots
    from phloem.engine.transfer import LastTokens
    from phloem.kernels.ops import Ops
    from phloem.kvcache.pool import KVPool
    from phloem.layers.context import AttentionSpec, BuildContext, ForwardBatch
    from phloem.models import Model


class DraftModel(Protocol):
    """A model, or a head, that drafts. It numbers its memory from 0, as any model does."""

    attention_specs: list[AttentionSpec]
    memory: list[MemorySpec]
    hidden_size: int

    @property
    def weight_bytes(self) -> int: ...

    def forward(self, step: ForwardBatch) -> Tensor:
        """Hidden states [L, N] of the rows `step.logit_index`."""
        ...

    def head(self, hidden_LN: Tensor, /) -> Tensor:
        """float32 logits [L, V] over the vocabulary of the model that it drafts for."""
        ...

    def greedy(self, hidden_LN: Tensor, /) -> Tensor:
        """The most likely token of each row, integer [L]."""
        ...


@dataclass(frozen=True)
class Block:
    """How a model drafts blocks in one pass."""

    size: int  # places, that of the last known token among them
    mask: int  # the token that stands at the others
    from_anchor: bool = False  # each place tells the token behind it, the first too; else each mask its own

    @property
    def skips(self) -> int:
        """Places before the first that tells."""
        return 0 if self.from_anchor else 1

    @property
    def most(self) -> int:
        """Drafts of a block."""
        return self.size - self.skips


@dataclass
class Loaded:
    """What was loaded beside a model to draft for it."""

    model: DraftModel
    first: int  # the pool index of its first memory
    carries: bool  # what a pass gives [L, N] stands in its first memory at the next positions, for the next pass
    decision: Decision
    tree: TreeShape | None = None  # it drafts trees of this shape; None: chains
    block: Block | None = None  # it drafts all at once; None: token by token


# Loads it, told the model, how that was built, and the most positions of a text.
Beside = Callable[["Model", "BuildContext", int], Loaded]


class DraftWork:
    """Drafts for the rows of one step after another, in the runner's thread."""

    def __init__(
        self,
        loaded: Loaded,
        forward: Forward,
        ops: Ops,
        pool: KVPool,
        slots: Slots,
        last: LastTokens,
    ) -> None:
        self._model, self._carries = loaded.model, loaded.carries
        self._passed_LN: Tensor | None = None  # of the last pass, until another one is run
        self._forward, self._ops, self._pool, self._slots = forward, ops, pool, slots
        self._last = copy(last)  # the same values; which slots yield is each step's own
        self._group = pool.group_of[0]

    def run(self, batch: Batch, late: bool = False) -> tuple[Batch, float]:
        """(The batch with drafts behind its rows' tokens, the seconds that this took).

        Beside the host the passes are given to the device one behind the other, and their drafts are waited for once;
        with `late` not at all: what stands for them goes with the batch.
        """
        plan, began = batch.drafting, perf_counter()
        assert plan is not None
        ends = np.cumsum(plan.lens)
        rows = np.flatnonzero(plan.lens)
        made: list[tuple[NDArray[np.intp], Tensor]] = []
        if len(rows):
            ids = np.concatenate([plan.ids[ends[row] - plan.lens[row] : ends[row]] for row in rows])
            positions, lens, depth = plan.starts[rows], plan.lens[rows], 0
            while len(rows):
                wants = plan.counts[rows] > depth
                tokens_L = self._pass(batch, rows, (positions, lens, ids), wants, depth)
                made.append((rows[wants], tokens_L))
                depth += 1
                on = plan.counts[rows[wants]] > depth
                positions = (positions + lens)[wants][on]
                ids = self._go_on(batch, rows[wants], tokens_L, on, positions, depth - 1)
                rows = rows[wants][on]
                lens = np.ones(len(rows), np.int32)
        drafts = standing(np.where(plan.lens, plan.counts, 0)) if self._stay(late) else _by_row(made)
        sent = with_drafts(batch, drafts) if drafts else batch
        return replace(sent, drafting=None), perf_counter() - began

    def _stay(self, late: bool) -> bool:
        """Whether the drafts need not come to the host."""
        return late and self._last.host is None

    def _pass(
        self,
        batch: Batch,
        rows: NDArray[np.intp],
        known: tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]],
        wants: NDArray[np.bool_],
        depth: int,
    ) -> Tensor:
        """The next draft of each row that wants one, int64 [L] where the model is; `known`: first position, how many,
        and what is read there."""
        part = self._part(batch, rows, known, wants)
        hidden_LN = self._passed(part)
        if not wants.any():
            return torch.zeros(0, dtype=torch.int64, device=self._pool.device)
        slots = part.slots[wants]
        before = (batch.prefix_lens + batch.query_lens)[rows[wants]] + depth
        if self._slots.columns.greedy[slots].all():
            tokens_L = self._model.greedy(hidden_LN)
        else:
            settings = self._slots.columns.rows(slots, before)
            tokens_L = sample(self._model.head(hidden_LN), settings, self._ops, self._last.up)
        return tokens_L.to(torch.int64, copy=True)  # a recording may write the next ones in their place

    def _go_on(
        self,
        batch: Batch,
        rows: NDArray[np.intp],
        tokens_L: Tensor,
        on: NDArray[np.bool_],
        positions: NDArray[np.int32],
        depth: int,
    ) -> NDArray[np.int32]:
        """What the next pass reads of those of these rows that go on, at these positions: the drafts, or on a device
        what stands for them; and there what the pass gave stands for the model's state."""
        places = self._places(batch.tables[self._group][rows[on]], positions, np.flatnonzero(on))
        if self._last.host is not None:
            self._carried(self._last.up(places) if places else [])
            return tokens_L.numpy()[on].astype(np.int32)
        if len(rows):
            marks = np.full(len(rows), DRAFTED - depth)
            at, *placed = self._last.up([self._last.places(batch.slots[rows], marks), *places])
            self._last.values.index_copy_(0, at, tokens_L)
            self._carried(placed)
        return np.full(int(on.sum()), DRAFTED - depth, np.int32)

    def _part(
        self,
        batch: Batch,
        rows: NDArray[np.intp],
        known: tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]],
        wants: NDArray[np.bool_],
    ) -> Batch:
        """What a pass reads of these rows, as `_pass` has it."""
        positions, lens, ids = known
        return Batch(
            batch.step,
            batch.slots[rows],
            lens.astype(np.int32),
            positions.astype(np.int32),
            ids.astype(np.int32),
            tuple(table[rows] for table in batch.tables),
            wants.astype(np.int32),
        )

    def _passed(self, part: Batch) -> Tensor:
        """Hidden states [L, N] of the rows that want a draft."""
        self._passed_LN = self._forward.run(Step(part, Wanted.of(part), self._pool, self._last), _nothing)
        return self._passed_LN

    def _places(
        self, table: NDArray[np.int32], positions: NDArray[np.int32], index: NDArray[np.int64]
    ) -> list[NDArray[Any]]:
        """Where what the pass gave for these of its rows goes, at positions of page tables [n, P], as `_carried` takes
        it; nothing of a model that reads no states."""
        if not self._carries or not len(positions):
            return []
        pages, offsets = np.divmod(positions, self._pool.page_size)
        return [(table[np.arange(len(table)), pages] * self._pool.page_size + offsets).astype(np.int32), index]

    def _carried(self, places: Sequence[Tensor]) -> None:
        """Put what the pass gave into the places [n] of `_places`."""
        if not places:
            return
        slots_n, index_n = places
        assert self._passed_LN is not None
        first, second = (half.unsqueeze(1) for half in self._passed_LN[index_n].chunk(2, -1))
        self._ops.write_kv(first, second, self._pool.keys[0], self._pool.values[0], slots_n)


def _by_row(made: Sequence[tuple[NDArray[np.intp], Tensor]]) -> dict[int, list[int]]:
    """The drafts of each row, in the order of the passes. Waits for the device, once."""
    found: dict[int, list[int]] = {}
    if not made:
        return found
    rows = np.concatenate([of for of, _ in made]).tolist()
    tokens = (made[0][1] if len(made) == 1 else torch.cat([tokens_L for _, tokens_L in made])).tolist()
    for row, token in zip(rows, tokens, strict=True):
        found.setdefault(row, []).append(token)
    return found


def standing(counts: NDArray[np.integer]) -> dict[int, list[int]]:
    """What stands for so many drafts of each row, of those that have any."""
    rows = np.flatnonzero(counts)
    return {int(row): list(range(DRAFTED, DRAFTED - int(counts[row]), -1)) for row in rows}


def _nothing() -> None:
    """A pass has nobody to settle with."""


def with_drafts(batch: Batch, drafts: dict[int, list[int]]) -> Batch:
    """The batch with drafts behind the tokens of these rows (see `core.batch.Batch`)."""
    if batch.num_rows == batch.num_tokens == 1:
        only = drafts[0]
        assert FROM_DEVICE not in only
        return replace(
            batch,
            query_lens=np.array([1 + len(only)], np.int32),
            outputs=batch.outputs + np.int32(len(only)),
            input_ids=np.array([batch.input_ids[0], *only], np.int32),
            drafts=None,
        )
    more = np.zeros(batch.num_rows, np.int32)
    rows = sorted(drafts)
    more[rows] = [len(drafts[row]) for row in rows]
    ends = np.cumsum(batch.query_lens)
    ids = [token for row in rows for token in drafts[row]]
    assert FROM_DEVICE not in ids
    return replace(
        batch,
        query_lens=batch.query_lens + more,
        outputs=batch.outputs + more,
        input_ids=np.insert(batch.input_ids, np.repeat(ends, more), np.array(ids, np.int32)),
        drafts=None,
    )


def extend(memory: list[MemorySpec], more: Sequence[MemorySpec]) -> int:
    """Put memory behind a model's; the pool index of the first."""
    first = len(memory)
    memory.extend(more)
    return first
