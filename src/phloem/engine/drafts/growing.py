"""A model that drafts trees: at each token several that may follow, as far as it finds them likely together.

As EAGLE-2 does (Li et al. 2024): of each depth the likeliest few are gone on from, by the product of the probabilities
on the way to them; of all that were seen the likeliest make the tree. A child is never likelier than its parent, so
they are one. Of a request that draws, the token that the model itself draws there, by the request's own draw, counts as
likely as such drafts were found to be right; the others share the rest.

Each token that is gone on from has pages of its own (`branches`), in which the model finds what it has read on the way.

Legend: n tokens that are gone on from, over all rows, k drafts that may follow each, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np
import torch

from phloem.engine.drafts.branches import ROOT, Branches, Copies, TreeShape
from phloem.engine.drafts.drafting import DraftWork, with_drafts
from phloem.engine.sampling.sampler import sample

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from phloem.core.batch import Batch, Drafting
    from phloem.engine.drafts.drafting import Loaded
    from phloem.engine.forward import Forward
    from phloem.engine.sampling.slots import Slots
    from phloem.engine.transfer import LastTokens
    from phloem.kernels.ops import Ops
    from phloem.kvcache.pool import KVPool

SHARED = 0.65  # how often a drafted draw is the model's, by a draw that both share: 0.55 to 0.8 by simulation


@dataclass(slots=True)
class Growth:
    """The drafts of one row that were seen, in the order in which they were. `count`: how many of them it may have."""

    row: int
    count: int
    shape: TreeShape
    tokens: list[int] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)  # logarithms
    parents: list[int] = field(default_factory=list)  # numbers of drafts, or ROOT
    fresh: list[int] = field(default_factory=list)  # those of the last depth
    depth: int = 0

    @property
    def width(self) -> int:
        return min(self.shape.width, self.count)

    def add(self, parent: int, tokens: Sequence[int], scores: Sequence[float]) -> None:
        """What may follow a draft, or the text."""
        above = self.scores[parent] if parent != ROOT else 0.0
        for token, score in zip(tokens[: self.width], scores[: self.width], strict=True):
            self.fresh.append(len(self.tokens))
            self.tokens.append(token)
            self.scores.append(above + min(score, 0.0))
            self.parents.append(parent)

    def go_on(self) -> list[int]:
        """The drafts that are gone on from, none at the last depth; from here on a new one begins."""
        self.depth += 1
        best = sorted(self.fresh, key=lambda one: (-self.scores[one], one))[: self.width]
        self.fresh = []
        return best if self.depth < min(self.shape.depth, self.count) else []

    def chosen(self) -> tuple[list[int], list[int]]:
        """(Tokens, parents) of the likeliest, in that order; parents by their place among them."""
        order = sorted(range(len(self.tokens)), key=lambda one: (-self.scores[one], one))[: self.count]
        places = {one: place for place, one in enumerate(order)}
        return [self.tokens[one] for one in order], [places.get(self.parents[one], ROOT) for one in order]


@dataclass(slots=True)
class Tip:
    """A token that is gone on from. `start`: the position of the first draft of its row, as the model reads them."""

    growth: Growth
    node: int  # ROOT: the last token of the text
    start: int
    pages: list[list[int]] = field(default_factory=list)  # [G]; of the root none
    source: Tip | None = None  # the one before it in its text
    place: int = 0  # among those of its pass


class TreeWork(DraftWork):
    """As `DraftWork`, for trees."""

    def __init__(
        self,
        loaded: Loaded,
        forward: Forward,
        ops: Ops,
        pool: KVPool,
        slots: Slots,
        last: LastTokens,
        own: Sequence[int],
    ) -> None:
        super().__init__(loaded, forward, ops, pool, slots, last)
        assert loaded.tree is not None
        self._shape, self._first = loaded.tree, loaded.first
        self._branches = Branches(pool, own, loaded.tree, last.up)

    def run(self, batch: Batch, late: bool = False) -> tuple[Batch, float]:
        del late  # which tokens are gone on from is found on the host
        plan, began = batch.drafting, perf_counter()
        assert plan is not None
        tips, hidden_LN = self._read(batch, plan)
        grown, depth = [tip.growth for tip in tips], 0
        if tips:
            self._sprout(batch, tips, hidden_LN, 0)
        while tips:
            depth += 1
            tips = self._ahead(tips, depth)
            if tips:
                self._step(batch, tips, depth)
        trees = {one.row: one.chosen() for one in grown}
        return replace(with_trees(batch, trees), drafting=None), perf_counter() - began

    def _read(self, batch: Batch, plan: Drafting) -> tuple[list[Tip], Tensor]:
        """The known tokens are read: the last one of each row that has drafts, and the states [L, N] there."""
        rows, ends = np.flatnonzero(plan.lens), np.cumsum(plan.lens)
        if not len(rows):
            return [], torch.zeros(0)
        ids = np.concatenate([plan.ids[ends[row] - plan.lens[row] : ends[row]] for row in rows])
        wants = plan.counts[rows] > 0
        hidden_LN = self._passed(self._part(batch, rows, (plan.starts[rows], plan.lens[rows], ids), wants))
        starts, counts = (plan.starts + plan.lens).tolist(), plan.counts.tolist()
        tips = [
            Tip(Growth(row, counts[row], self._shape), ROOT, starts[row], place=place)
            for place, row in enumerate(rows[wants].tolist())
        ]
        return tips, hidden_LN

    def _ahead(self, tips: Sequence[Tip], depth: int) -> list[Tip]:
        """The drafts of this depth that are gone on from, each with pages for the way to it."""
        found = list[Tip]()
        by_node = {(tip.growth.row, tip.node): tip for tip in tips}
        # Pages are read while others are written: the depths take turns.
        used = (depth % 2) * self._shape.most
        for growth in {tip.growth.row: tip.growth for tip in tips}.values():
            for node in growth.go_on():
                source, place = by_node[growth.row, growth.parents[node]], len(found)
                found.append(Tip(growth, node, source.start, self._branches.pages(used + place), source, place))
        return found

    def _step(self, batch: Batch, tips: Sequence[Tip], depth: int) -> None:
        """One pass over the drafts that are gone on from."""
        rows = np.array([tip.growth.row for tip in tips])
        positions = np.array([tip.start for tip in tips], np.int32) + np.int32(depth - 1)
        self._bring(batch, tips)
        tables = self._tables(batch, tips)
        came = [tip.source.place for tip in tips if tip.source is not None]
        places = self._places(tables[self._group], positions, np.array(came, np.int64))
        self._carried(self._last.up(places) if places else [])
        ids, ones = np.array([tip.growth.tokens[tip.node] for tip in tips], np.int32), np.ones(len(tips), np.int32)
        part = replace(self._part(batch, rows, (positions, ones, ids), ones > 0), tables=tables)
        self._sprout(batch, tips, self._passed(part), depth)

    def _tables(self, batch: Batch, tips: Sequence[Tip]) -> tuple[NDArray[np.int32], ...]:
        """Of each group the page table of the way to each of them."""
        return tuple(
            np.stack([self._branches.table(whole[tip.growth.row], tip.start, tip.pages[group]) for tip in tips])
            for group, whole in enumerate(batch.tables)
        )

    def _bring(self, batch: Batch, tips: Sequence[Tip]) -> None:
        """What the model has kept on the way to each of them, into its pages."""
        size, copies = self._pool.page_size, [Copies() for _ in batch.tables]
        for tip in tips:
            for group, one in enumerate(copies):
                if tip.source is not None and tip.source.node != ROOT:
                    one.to += tip.pages[group]
                    one.of += tip.source.pages[group]
                elif tip.start % size:
                    one.to.append(tip.pages[group][0])
                    one.of.append(int(batch.tables[group][tip.growth.row, tip.start // size]))
        for group, one in enumerate(copies):
            one.run(self._pool.stored(group, self._first), self._last.up)

    def _sprout(self, batch: Batch, tips: Sequence[Tip], hidden_LN: Tensor, depth: int) -> None:
        """Note what may follow each of them. `depth`: drafts before it."""
        rows = np.array([tip.growth.row for tip in tips])
        best_nk, ids_nk, drawn_n = self._likely(batch, rows, hidden_LN, depth)
        greedy = self._slots.columns.greedy[batch.slots[rows]]
        scores, ids = best_nk.cpu().numpy().astype(np.float64), ids_nk.cpu().numpy()
        drawn = None if drawn_n is None else drawn_n.cpu().numpy()
        for place, tip in enumerate(tips):
            if drawn is None or greedy[place]:
                tip.growth.add(tip.node, ids[place].tolist(), scores[place].tolist())
            else:
                tip.growth.add(tip.node, *with_draw(ids[place], scores[place], int(drawn[place])))

    def _likely(
        self, batch: Batch, rows: NDArray[np.intp], hidden_LN: Tensor, depth: int
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """What may follow the last of `depth` drafts of each of these rows: logarithms of how likely each is and ids
        [n, k], best first; and the tokens that are drawn, int64 [n], of which those of greedy rows do not count, or
        None where all are greedy."""
        slots, known = batch.slots[rows], (batch.prefix_lens + batch.query_lens)[rows] + depth
        columns, logits_nV = self._slots.columns, self._model.head(hidden_LN)
        greedy = columns.greedy[slots]
        heats = np.where(greedy, np.float32(1), columns.temperature[slots])
        logs_nV = torch.log_softmax(logits_nV.float() / self._last.up([heats])[0].unsqueeze(1), -1)
        best_nk, ids_nk = logs_nV.topk(min(self._shape.width, logs_nV.shape[1]), -1)
        drawn = None if greedy.all() else sample(logits_nV, columns.rows(slots, known), self._ops, self._last.up)
        return best_nk, ids_nk, None if drawn is None else drawn.long()


def with_draw(ids_k: NDArray[np.int64], scores_k: NDArray[np.float64], drawn: int) -> tuple[list[int], list[float]]:
    """(Tokens, logarithms of how likely each is) where one token was drawn, which comes first."""
    shares = np.exp(scores_k)
    found = np.flatnonzero(ids_k == drawn)
    own = float(shares[found[0]]) if len(found) else 0.0
    first = max(own, SHARED, 1e-9)
    others = [place for place in range(len(ids_k)) if ids_k[place] != drawn and np.isfinite(scores_k[place])]
    left = (1 - first) / max(1 - own, 1e-9)
    scores = [float(np.log(max(shares[place] * left, 1e-30))) for place in others]
    return [drawn, *ids_k[others].tolist()], [float(np.log(first)), *scores]


def with_trees(batch: Batch, trees: dict[int, tuple[list[int], list[int]]]) -> Batch:
    """The batch with the (tokens, parents) of these rows behind their tokens (see `core.batch.Batch`)."""
    if not trees:
        return batch
    sent = with_drafts(batch, {row: tokens for row, (tokens, _) in trees.items()})
    if all(parents == list(range(ROOT, len(parents) - 1)) for _, parents in trees.values()):
        return sent
    ends = np.cumsum(sent.query_lens)
    before = np.arange(-1, sent.num_tokens - 1, dtype=np.int32)
    before[ends - sent.query_lens] = -1
    for row, (_, parents) in trees.items():
        root = int(ends[row]) - len(parents) - 1
        before[root + 1 : ends[row]] = np.array(parents, np.int32) + root + 1
    return replace(sent, parents=before)
