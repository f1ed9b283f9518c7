"""A model that drafts a whole block in one pass, within the runner's own steps (DFlash; see `models/_dflash.py`).

Of each row the pass takes in the features of the known tokens that it has not seen, and asks with the last known token
and masks behind it, at once. What it writes at the masks' positions is written anew when their tokens are known.

A place of a block sees the places behind it too. So each is a row of one token whose pages are its text's up to the
block's end: every backend's usual kernel serves it, as the keys and values of all places are written before any is
attended to.

Legend: n rows of the step that draft or catch up, C features that are taken in, B places of all blocks, T = C + B.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np
import torch

from phloem.attention import Memory
from phloem.engine.drafts.drafting import DraftWork, standing, with_drafts
from phloem.engine.sampling.sampler import sample
from phloem.kernels.calls import PagedBatch
from phloem.layers.context import ForwardBatch, Heads

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray
    from torch import Tensor

    from phloem.attention import AttentionBackend
    from phloem.core.batch import Batch, Drafting
    from phloem.engine.drafts.drafting import Loaded
    from phloem.engine.forward import Forward
    from phloem.engine.recorded.pieces import PieceGraphs
    from phloem.engine.sampling.slots import Slots
    from phloem.engine.transfer import LastTokens
    from phloem.kvcache.pool import KVPool
    from phloem.layers.context import AttentionSpec, AttentionStep
    from phloem.models._dflash import DFlash


@dataclass(slots=True)
class Asked:
    """What a pass reads and asks, on the host. `each_C`, `each_B`: of which of the n rows."""

    each_C: NDArray[np.int64]
    known_C: NDArray[np.int32]  # positions whose features are taken in
    each_B: NDArray[np.int64]
    offset_B: NDArray[np.int32]  # places within their blocks
    place_B: NDArray[np.int32]  # their positions
    ids_B: NDArray[np.int64]
    end_B: NDArray[np.int32]  # the position behind their block
    index_L: NDArray[np.int64]  # which places' tokens are wanted, row by row
    last_n: NDArray[np.int64]  # the last known token


class BlockMemory(Memory):
    """Of a pass: `wide` attends to whole blocks, the usual steps to what stands before each place.

    `ahead`: by pool, whether a layer's places see those behind them. `apart`: of each distance to its block's end but
    0, which of the T tokens have it, and the step of those alone; empty where no text is longer than the least window.
    """

    def __init__(
        self,
        inner: Memory,
        wide: AttentionStep,
        ahead: Mapping[int, bool],
        apart: Mapping[int, tuple[Tensor, AttentionStep]],
    ) -> None:
        super().__init__(inner.pool, inner.steps, inner.ops, inner.batches)
        self._wide, self._ahead, self._apart = wide, ahead, apart

    def attend(self, spec: AttentionSpec, heads: Heads) -> Tensor:
        if not self._ahead[spec.pool]:
            return super().attend(spec, heads)
        if not spec.window:
            return self._wide(spec, heads)
        if not self._apart:
            return self._wide(replace(spec, window=0), heads)
        return self._in_window(spec, heads)

    def _in_window(self, spec: AttentionSpec, heads: Heads) -> Tensor:
        """A kernel counts a window from the last key that a row sees, and these queries stand before it."""
        before = heads.q.clone()  # attention uses it up
        out = self._wide(spec, heads)  # right for the last place of each block
        for distance, (index, step) in self._apart.items():
            q, turn = before[index], heads.rotation
            turn = None if turn is None else replace(turn, positions=turn.positions[index])
            own = replace(spec, window=spec.window + distance, writes=False)
            out[index] = step(own, Heads(q, q[:, :0], q[:, :0], heads.sinks, turn))
        return out


class BlockWork(DraftWork):
    """As `DraftWork`, for models that draft blocks."""

    def __init__(
        self,
        loaded: Loaded,
        forward: Forward,
        backend: AttentionBackend,
        pool: KVPool,
        slots: Slots,
        last: LastTokens,
        drafter: DFlash,
        pieces: PieceGraphs | None = None,
    ) -> None:
        super().__init__(loaded, forward, backend.ops, pool, slots, last)
        self._pieces = pieces
        assert loaded.block is not None
        self._block, self._backend, self._drafter = loaded.block, backend, drafter
        windows = [spec.window for spec in drafter.attention_specs if spec.window and drafter.ahead[spec.pool]]
        self._window = min(windows, default=0)

    def run(self, batch: Batch, late: bool = False) -> tuple[Batch, float]:
        plan, began = batch.drafting, perf_counter()
        assert plan is not None
        rows = np.flatnonzero(plan.lens)
        drafts: dict[int, list[int]] = {}
        if len(rows):
            asked = self._asked(batch, plan, rows)
            hidden_LN = self._block_pass(batch.tables[self._group][rows], asked)
            if len(asked.index_L):
                tokens_L = self._told(batch, rows, asked, hidden_LN)
                drafts = self._given(batch.slots, rows[asked.each_B[asked.index_L]], tokens_L, late)
        sent = with_drafts(batch, drafts) if drafts else batch
        return replace(sent, drafting=None), perf_counter() - began

    def _given(
        self, slots: NDArray[np.int32], rows_L: NDArray[np.intp], tokens_L: Tensor, late: bool
    ) -> dict[int, list[int]]:
        """The drafts of each row, those of one behind the other; if they may be `late`, what stands for them."""
        if not self._stay(late):
            drafts: dict[int, list[int]] = {}
            for row, token in zip(rows_L.tolist(), tokens_L.tolist(), strict=True):
                drafts.setdefault(row, []).append(token)
            return drafts
        counts = np.bincount(rows_L, minlength=len(slots))
        found = standing(counts)
        self._last.put(slots[rows_L], np.concatenate([found[row] for row in sorted(found)]), tokens_L)
        return found

    def _asked(self, batch: Batch, plan: Drafting, rows: NDArray[np.intp]) -> Asked:
        block, starts, lens = self._block, plan.starts[rows], plan.lens[rows]
        anchors, wants = starts + lens, plan.counts[rows]
        # As many masks as drafts may be verified here, not as many as are: a place's token depends on those behind it.
        room = wants if batch.drafts is None else np.maximum(batch.drafts[rows], wants)
        widths = np.where(wants > 0, np.minimum(block.size, room + block.skips), 0)
        each_C, known_C = _spread(starts, lens)
        each_B, place_B = _spread(anchors, widths)
        offset_B = place_B - anchors[each_B]
        ids_B = np.full(len(each_B), block.mask, np.int64)
        # What is read behind the last known position is the last known token.
        last_n = plan.ids[np.cumsum(plan.lens)[rows] - 1].astype(np.int64)
        ids_B[offset_B == 0] = last_n[widths > 0]
        told_B = (offset_B >= block.skips) & (offset_B < block.skips + wants[each_B])
        end_B = (anchors + widths)[each_B]
        return Asked(each_C, known_C, each_B, offset_B, place_B, ids_B, end_B, np.flatnonzero(told_B), last_n)

    def _block_pass(self, table: NDArray[np.int32], asked: Asked) -> Tensor:
        """Hidden states [L, N] of the wanted places; `table` [n, P]."""
        tokens = len(asked.each_C) + len(asked.each_B)
        found = None if self._pieces is None else self._pieces.graphs.get(tokens)
        if self._pieces is None or found is None:
            return self._drafter.forward(self._planned(table, asked))
        # The pieces take features and places side by side, told apart by their ids.
        features = np.full(len(asked.each_C), -1, np.int64)
        whole = replace(asked, ids_B=np.concatenate([features, asked.ids_B]), index_L=asked.index_L + len(features))
        step = self._planned(table, whole)
        assert isinstance(step.memory, Memory)
        found.inputs.fill(step.input_ids, step.positions, step.memory.batches)
        return self._pieces.passed(found, step)

    def _planned(self, table: NDArray[np.int32], asked: Asked) -> ForwardBatch:
        """The pass over pages `table` [n, P]: positions are of T, ids and wanted places as they were asked."""
        size, up = self._pool.page_size, self._last.up
        each_T = np.concatenate([asked.each_C, asked.each_B])
        positions_T = np.concatenate([asked.known_C, asked.place_B])
        slots_T = table[each_T, positions_T // size] * np.int32(size) + positions_T % size
        farthest, count = int(asked.end_B.max(initial=1)), len(asked.known_C)
        # A feature asks nothing: as a row it sees one key, of whatever page.
        ones_C, width = np.ones(count, np.int32), -(-farthest // size)
        table_TP = np.concatenate([np.zeros((count, width), np.int32), table[asked.each_B, :width]])
        arrays = [
            positions_T.astype(np.int64), asked.ids_B, asked.index_L,
            np.arange(len(each_T) + 1, dtype=np.int32), table_TP, slots_T.astype(np.int32),
            np.concatenate([ones_C, asked.place_B + 1]).astype(np.int32), np.concatenate([ones_C, asked.end_B]),
        ]  # fmt: skip
        positions, ids, index, starts, pages, slots, own, whole = up(arrays)
        rows = PagedBatch(starts, own, pages, slots, 1, farthest)
        wide = replace(rows, seq_lens=whole)
        groups = len(self._pool.groups)
        step = self._backend.begin(rows, self._pool)
        inner = Memory(self._pool, [step] * groups, self._backend.ops, [rows] * groups)
        apart = self._apart(asked, wide) if self._window and farthest > self._window else {}
        memory = BlockMemory(inner, self._backend.begin(wide, self._pool), self._drafter.ahead, apart)
        return ForwardBatch(ids, positions, memory, index)

    def _apart(self, asked: Asked, wide: PagedBatch) -> dict[int, tuple[Tensor, AttentionStep]]:
        found: dict[int, tuple[Tensor, AttentionStep]] = {}
        distance_B = asked.end_B - 1 - asked.place_B
        for distance in range(1, int(distance_B.max(initial=0)) + 1):
            at = np.flatnonzero(distance_B == distance) + len(asked.known_C)
            index, starts = self._last.up([at, np.arange(len(at) + 1, dtype=np.int32)])
            part = PagedBatch(
                starts, wide.seq_lens[index], wide.page_table[index], wide.token_slots[index], 1, wide.max_seq_len
            )
            found[distance] = index, self._backend.begin(part, self._pool)
        return found

    def _told(self, batch: Batch, rows: NDArray[np.intp], asked: Asked, hidden_LN: Tensor) -> Tensor:
        """The token of each wanted place [L], drawn as the model's own will be; nothing waits for them."""
        each = rows[asked.each_B[asked.index_L]]
        depth = asked.offset_B[asked.index_L] - self._block.skips
        slots, before = batch.slots[each], (batch.prefix_lens + batch.query_lens)[each] + depth
        if self._drafter.term is None:
            return self._chosen(hidden_LN, slots, before, None)
        found_L = torch.zeros(len(each), dtype=torch.int64, device=hidden_LN.device)
        anchors = asked.last_n[asked.each_B[asked.index_L]]
        for place in range(int(depth.max()) + 1):
            at = np.flatnonzero(depth == place)
            index, told_n = self._last.up([at, anchors[at]])
            told_n = found_L[index - 1] if place else told_n
            found_L.index_copy_(0, index, self._chosen(hidden_LN[index], slots[at], before[at], told_n))
        return found_L

    def _chosen(
        self, hidden_LN: Tensor, slots: NDArray[np.int32], before: NDArray[np.int32], told_L: Tensor | None
    ) -> Tensor:
        """int64 tokens of places, each behind so many tokens of its text. `told_L`: the tokens before them, where those
        change what is said."""
        if not self._slots.columns.greedy[slots].all():
            settings = self._slots.columns.rows(slots, before.astype(np.int32))
            tokens_L = sample(self._drafter.head(hidden_LN, told_L), settings, self._ops, self._last.up)
        elif told_L is None:
            tokens_L = self._drafter.greedy(hidden_LN)
        else:
            tokens_L = self._ops.argmax(self._drafter.head(hidden_LN, told_L))
        return tokens_L.to(torch.int64, copy=True)


def _spread(starts: NDArray[np.int32], lens: NDArray[np.int32]) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """Of runs of numbers: (which run each is of, the numbers)."""
    each = np.repeat(np.arange(len(starts)), lens)
    ends = np.cumsum(lens)
    return each, (np.arange(len(each)) - (ends - lens - starts)[each]).astype(np.int32)
