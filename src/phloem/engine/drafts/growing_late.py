"""Trees on a device, waited for once: which drafts are gone on from is chosen there too.

How many there are at each depth, and where each keeps what the model has read on the way to it, is known beforehand:
every row that goes on has as many as its width. So the host gives all passes to the device one behind the other, and
puts the trees together when the last has ended; of the same candidates they are those that `growing` finds.

Legend: n drafts that are gone on from, over all R rows, k that may follow each, W the width of a tree.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np
import torch

from phloem.core.batch import DRAFTED
from phloem.engine.drafts.branches import ROOT
from phloem.engine.drafts.growing import SHARED, Growth, Tip, TreeWork, with_trees

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from phloem.core.batch import Batch

LEAST = -1e30  # of what cannot follow at all, which still comes before nothing


@dataclass(slots=True)
class Seen:
    """What may follow the drafts `tips` of one depth."""

    tips: list[Tip]  # whose `node` counts those of a row
    ids_nk: Tensor
    scores_nk: Tensor  # float64, each behind the draft before it
    total_nk: Tensor  # float64, on the whole way to it
    chosen: Tensor | None = None  # [n of the next depth] int64, of the row's W k: which of these each is


class LateTrees(TreeWork):
    """As `TreeWork`, beside the host."""

    def run(self, batch: Batch, late: bool = False) -> tuple[Batch, float]:
        plan, began = batch.drafting, perf_counter()
        assert plan is not None
        roots, hidden_LN = self._read(batch, plan)
        seen = [self._seen(batch, roots, hidden_LN, 0, None)] if roots else []
        while seen and (tips := self._tips(seen[-1].tips, len(seen))):
            seen.append(self._grown(batch, seen[-1], tips, len(seen)))
        trees = {one.row: one.chosen() for one in _put_together(seen)}
        return replace(with_trees(batch, trees), drafting=None), perf_counter() - began

    def _tips(self, before: Sequence[Tip], depth: int) -> list[Tip]:
        """The drafts of this depth that are gone on from, as far as the host knows them."""
        found, used = list[Tip](), (depth % 2) * self._shape.most
        for root in {tip.growth.row: tip for tip in before}.values():
            growth = root.growth
            if depth < min(self._shape.depth, growth.count):
                source = root if depth == 1 else None
                for number in range(growth.width):
                    pages = self._branches.pages(used + len(found))
                    found.append(Tip(growth, number, root.start, pages, source, len(found)))
        return found

    def _grown(self, batch: Batch, seen: Seen, tips: list[Tip], depth: int) -> Seen:
        """One pass over the drafts that are gone on from."""
        came_n, tokens_n, total_n = self._choose(seen, tips)
        rows = np.array([tip.growth.row for tip in tips])
        positions = np.array([tip.start for tip in tips], np.int32) + np.int32(depth - 1)
        if depth == 1:
            self._bring(batch, tips)
        else:
            self._bring_from(tips, came_n + ((depth - 1) % 2) * self._shape.most)
        tables, ones = self._tables(batch, tips), np.ones(len(tips), np.int32)
        marks = DRAFTED - np.array([tip.node for tip in tips], np.int32)
        places = self._places(tables[self._group], positions, np.zeros(0, np.int64))[:1]
        at, *slots_n = self._last.up([self._last.places(batch.slots[rows], marks), *places])
        self._last.values.index_copy_(0, at, tokens_n)
        self._carried([*slots_n, came_n] if slots_n else [])
        part = replace(self._part(batch, rows, (positions, ones, marks), ones > 0), tables=tables)
        return self._seen(batch, tips, self._passed(part), depth, total_n)

    def _choose(self, seen: Seen, tips: Sequence[Tip]) -> tuple[Tensor, Tensor, Tensor]:
        """Of the likeliest of each row: which of `seen` each comes behind [n], its token, how likely it is in all."""
        wide, count, total_nk = self._shape.width, seen.ids_nk.shape[1], seen.total_nk
        rows = {row: place for place, row in enumerate({tip.growth.row: None for tip in seen.tips})}
        first = dict[int, int]()
        for tip in seen.tips:
            first.setdefault(tip.growth.row, tip.place)
        of = [tip.growth.row for tip in tips]
        at, widths, which, base = self._last.up([
            np.array([rows[r] * wide + tip.place - first[r] for tip in seen.tips for r in (tip.growth.row,)], np.int64),
            np.array([tip.growth.width for tip in seen.tips], np.int64),
            np.array([rows[row] * wide + tip.node for row, tip in zip(of, tips, strict=True)], np.int64),
            np.array([first[row] for row in of], np.int64),
        ])  # fmt: skip
        allowed_nk = torch.arange(count, device=widths.device) < widths.unsqueeze(1)
        grid = total_nk.new_full((len(rows) * wide, count), float("-inf"))
        grid.index_copy_(0, at, total_nk.clamp(min=LEAST).masked_fill(~allowed_nk, float("-inf")))
        order = grid.view(len(rows), -1).sort(descending=True, stable=True).indices[:, :wide]
        seen.chosen = order.reshape(-1)[which]
        came_n, column_n = base + seen.chosen // count, seen.chosen % count
        return came_n, seen.ids_nk[came_n, column_n], total_nk[came_n, column_n]

    def _bring_from(self, tips: Sequence[Tip], branch_n: Tensor) -> None:
        """What the model has kept on the way to each, out of the pages of these branches."""
        each = self._branches.each
        starts_n1 = branch_n.unsqueeze(1) * each
        within = torch.arange(each, device=branch_n.device)
        to = [np.array([page for tip in tips for page in tip.pages[group]], np.int64) for group in self._every_group]
        for group, to_m in zip(self._every_group, self._last.up(to), strict=True):
            of_m = (self._branches.pages(0)[group][0] + starts_n1 + within).view(-1)
            for tensor in self._pool.stored(group, self._first):
                tensor.index_copy_(0, to_m, tensor.index_select(0, of_m))

    @property
    def _every_group(self) -> range:
        return range(len(self._pool.groups))

    def _seen(self, batch: Batch, tips: list[Tip], hidden_LN: Tensor, depth: int, before_n: Tensor | None) -> Seen:
        """`before_n`: how likely each of them is; None: they are known."""
        rows = np.array([tip.growth.row for tip in tips])
        best_nk, ids_nk, drawn_n = self._likely(batch, rows, hidden_LN, depth)
        scores_nk = best_nk.double()
        if drawn_n is not None:
            (greedy_n,) = self._last.up([self._slots.columns.greedy[batch.slots[rows]]])
            drawn = first_drawn(ids_nk, scores_nk, drawn_n)
            ids_nk, scores_nk = (
                torch.where(greedy_n.unsqueeze(1), plain, other)
                for plain, other in zip((ids_nk, scores_nk), drawn, strict=True)
            )
        total_nk = scores_nk.clamp(max=0.0)
        return Seen(tips, ids_nk, scores_nk, total_nk if before_n is None else total_nk + before_n.unsqueeze(1))


def first_drawn(ids_nk: Tensor, scores_nk: Tensor, drawn_n: Tensor) -> tuple[Tensor, Tensor]:
    """As `growing.with_draw`, of rows; the last of k is left out where the drawn token is none of them."""
    shares_nk, same_nk, count = scores_nk.exp(), ids_nk == drawn_n.unsqueeze(1), ids_nk.shape[1]
    own_n = shares_nk.masked_fill(~same_nk, 0.0).sum(-1)
    first_n = own_n.clamp(min=max(SHARED, 1e-9))
    left_n = (1 - first_n) / (1 - own_n).clamp(min=1e-9)
    rest_nk = (shares_nk * left_n.unsqueeze(1)).clamp(min=1e-30).log()
    out_nk = same_nk | ~scores_nk.isfinite()
    rest_nk = rest_nk.masked_fill(out_nk, float("-inf"))
    places = torch.arange(count, device=ids_nk.device)
    order = places.expand_as(ids_nk).masked_fill(out_nk, count).sort(stable=True).indices[:, : count - 1]
    ids = torch.cat([drawn_n.unsqueeze(1), ids_nk.gather(1, order)], 1)
    return ids, torch.cat([first_n.log().unsqueeze(1), rest_nk.gather(1, order)], 1)


def _put_together(seen: Sequence[Seen]) -> list[Growth]:
    """The trees of all rows. Waits for the device, once."""
    if not seen:
        return []
    parts = [part for one in seen for part in (one.ids_nk, one.scores_nk, one.chosen) if part is not None]
    told: NDArray[np.float64] = torch.cat([part.reshape(-1).double() for part in parts]).cpu().numpy()
    arrays = iter(np.split(told, np.cumsum([part.numel() for part in parts])[:-1]))
    nodes = [ROOT] * len(seen[0].tips)
    for depth, one in enumerate(seen):
        count = one.ids_nk.shape[1]
        ids, scores = (next(arrays).reshape(-1, count) for _ in range(2))
        first = {tip.growth.row: len(tip.growth.tokens) for tip in one.tips}
        for place, tip in enumerate(one.tips):
            tip.growth.add(nodes[place], ids[place].astype(np.int64).tolist(), scores[place].tolist())
        if one.chosen is not None:
            which = next(arrays).astype(np.int64).tolist()
            nodes = [
                first[tip.growth.row] + at // count * min(tip.growth.width, count) + at % count
                for tip, at in zip(seen[depth + 1].tips, which, strict=True)
            ]
    return [tip.growth for tip in seen[0].tips]
