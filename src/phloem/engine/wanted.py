"""Which positions of a step yield a token, and how many of these count when drafts are verified.

Every position is sampled with its own draw, as if its drafts were known tokens. A draft is accepted while the token
that was chosen before it is the same; the first other one is the last that counts. So a row's tokens are those of
decoding them one by one, whatever the drafts are. Where drafts branch, the token that was chosen picks the one to go on
with among those that follow the same.

Legend: L positions that yield, row by row; n rows that yield.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from phloem.core.batch import FROM_DEVICE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from phloem.core.batch import Batch

    Up = Callable[[Sequence[NDArray[Any]]], list[Tensor]]

NONE = FROM_DEVICE  # in `drafts`: nothing follows this position


@dataclass(slots=True)
class Wanted:
    """The positions of one step that yield a token."""

    rows: NDArray[np.int64]  # [L]
    slots: NDArray[np.int32]  # [L]
    known: NDArray[np.int32]  # [L] tokens before the one that is chosen there: its position in its request
    at: NDArray[np.int64]  # [L] which of the step's T tokens it is
    # [L] the draft behind it, NONE, or until the step lands what stands for one that the device alone knows; None: no
    # row verifies.
    drafts: NDArray[np.int32] | None = None
    starts: NDArray[np.int64] | None = None  # [n] each row's first; None: every row has one
    errors: dict[int, Exception] = field(default_factory=dict)  # first position of a row -> why the row fails

    @staticmethod
    def of(batch: Batch) -> Wanted:
        if batch.places is not None:
            places = batch.places
            known = np.zeros(len(places.rows), np.int32)  # nothing follows from it: draws are the places' own
            return Wanted(places.rows, batch.slots[places.rows], known, places.at)
        outputs = batch.outputs
        rows = outputs.nonzero()[0]
        ends = batch.prefix_lens + batch.query_lens
        single = batch.num_tokens == batch.num_rows
        if single or (outputs <= 1).all():
            at = rows if single else (np.cumsum(batch.query_lens, dtype=np.int64) - 1)[rows]
            return Wanted(rows, batch.slots[rows], ends[rows], at)
        counts = outputs[rows]
        starts = np.cumsum(counts) - counts
        places = np.repeat(rows, counts)
        offsets = np.arange(len(places)) - np.repeat(starts, counts)
        at = (np.cumsum(batch.query_lens) - outputs)[places] + offsets
        if batch.parents is not None:
            return Branching.of_tree(batch, batch.parents, (places, offsets, at, starts))
        following = batch.input_ids[np.minimum(at + 1, batch.num_tokens - 1)]
        drafts = np.where(offsets + 1 < outputs[places], following, np.int32(NONE))
        known = ((ends - outputs + 1)[places] + offsets).astype(np.int32)
        return Wanted(places, batch.slots[places], known, at, drafts, starts)

    @property
    def drafted(self) -> int:
        """Drafts that are verified."""
        return 0 if self.starts is None else len(self.rows) - len(self.starts)

    @property
    def late(self) -> bool:
        """Whether the device alone knows some of the drafts."""
        return self.drafts is not None and bool((self.drafts < NONE).any())

    def spans(self) -> Iterator[tuple[int, int]]:
        """(First position, end) of each row."""
        if self.starts is None:
            return ((i, i + 1) for i in range(len(self.rows)))
        return zip(self.starts.tolist(), [*self.starts[1:].tolist(), len(self.rows)], strict=True)

    def drafts_of(self, start: int, end: int) -> list[int]:
        """The drafts of the row whose positions are [start, end)."""
        return [] if self.drafts is None else self.drafts[start : end - 1].tolist()

    def before(self, start: int, position: int) -> list[int]:
        """The drafts between the first position of a row and this one, whose own is the last of them."""
        return self.drafts_of(start, position + 1)

    def runs(self, start: int, end: int) -> list[list[int]]:
        """The positions [start, end) of a row in their order in its text; where drafts branch, once for each branch."""
        return [list(range(start, end))]

    def kept(self, tokens_L: NDArray[np.integer]) -> list[NDArray[np.int64]]:
        """[n] of each row the positions that count, in their order."""
        starts = range(len(tokens_L)) if self.starts is None else self.starts.tolist()
        return [np.arange(start, end + 1) for start, end in zip(starts, self.last(tokens_L).tolist(), strict=True)]

    def fail(self, start: int, position: int, error: Exception) -> None:
        """No token can be chosen at this position of the row that begins at `start`.

        Behind drafts it is as if the last of them were refused: what is wrong shows again, or not, when the token
        before it is known.
        """
        if position == start:
            self.errors.setdefault(start, error)
        elif self.drafts is not None:
            self.drafts[position - 1] = NONE

    def last(self, tokens_L: NDArray[np.integer]) -> NDArray[np.int64]:
        """[n]: each row's last position that counts."""
        if self.drafts is None or self.starts is None:
            return np.arange(len(tokens_L))
        places = np.arange(len(tokens_L))
        ends = np.where(tokens_L == self.drafts, len(tokens_L), places)
        return np.minimum.accumulate(ends[::-1])[::-1][self.starts]

    def last_on_device(self, tokens_L: Tensor, up: Up, late_L: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(As `last`, [L] whether each position counts), where the tokens are: nothing waits for their values.

        `late_L`: the drafts, if the device alone knows them.
        """
        assert self.drafts is not None and self.starts is not None
        starts, *sent = up([self.starts, *([self.drafts] if late_L is None else [])])
        drafts_L = sent[0] if late_L is None else late_L
        places = torch.arange(len(tokens_L), device=tokens_L.device)
        ends = torch.where(tokens_L == drafts_L, len(tokens_L), places)
        last = ends.flip(0).cummin(0).values.flip(0)[starts]
        first = torch.zeros_like(places).index_fill_(0, starts, 1).cumsum(0) - 1
        return last, places <= last[first]


@dataclass(slots=True)
class Branching(Wanted):
    """Of a step whose drafts branch. `drafts` has what stands at a position itself; NONE: a known token, or a draft
    that does not count, whatever is chosen before it."""

    parents: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))  # [L] a row's first has none: -1

    @staticmethod
    def of_tree(batch: Batch, parents_T: NDArray[np.int32], found: tuple[NDArray[np.int64], ...]) -> Branching:
        """`found`: the row, the place in its row and the token of each position [L], and the first of each row [n]."""
        rows, offsets, at, starts = found
        place_T = np.full(batch.num_tokens, -1, np.int64)
        place_T[at] = np.arange(len(at))
        parents = np.where(offsets == 0, -1, place_T[parents_T[at]])
        known = ((batch.prefix_lens + batch.query_lens - batch.outputs + 1)[rows]).astype(np.int32)
        for place in np.flatnonzero(offsets).tolist():
            known[place] = known[parents[place]] + 1
        drafts = np.where(offsets == 0, np.int32(NONE), batch.input_ids[at])
        return Branching(rows, batch.slots[rows], known, at, drafts, starts, parents=parents)

    def drafts_of(self, start: int, end: int) -> list[int]:
        raise AssertionError(f"the drafts of [{start}, {end}) have several orders")

    def before(self, start: int, position: int) -> list[int]:
        assert self.drafts is not None
        return self.drafts[self._way(position)[1:]].tolist()

    def runs(self, start: int, end: int) -> list[list[int]]:
        inner = set(self.parents[start:end].tolist())
        return [self._way(position) for position in range(start, end) if position not in inner]

    def fail(self, start: int, position: int, error: Exception) -> None:
        if position == start:
            self.errors.setdefault(start, error)
        elif self.drafts is not None:
            self.drafts[position] = NONE

    def kept(self, tokens_L: NDArray[np.integer]) -> list[NDArray[np.int64]]:
        assert self.drafts is not None and self.starts is not None
        right: dict[tuple[int, int], int] = {}  # (position, token chosen there) -> the draft that is that token
        for place, (parent, draft) in enumerate(zip(self.parents.tolist(), self.drafts.tolist(), strict=True)):
            if parent >= 0 and draft != NONE:
                right.setdefault((parent, draft), place)
        found: list[NDArray[np.int64]] = []
        for start in self.starts.tolist():
            way, at = [start], right.get((start, int(tokens_L[start])))
            while at is not None:
                way.append(at)
                at = right.get((at, int(tokens_L[at])))
            found.append(np.array(way, np.int64))
        return found

    def last(self, tokens_L: NDArray[np.integer]) -> NDArray[np.int64]:
        return np.array([way[-1] for way in self.kept(tokens_L)], np.int64)

    def last_on_device(self, tokens_L: Tensor, up: Up, late_L: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Waits for the values: which way is taken is found on the host."""
        assert late_L is None
        kept = self.kept(tokens_L.cpu().numpy())
        counts = np.zeros(len(tokens_L), np.bool_)
        counts[np.concatenate(kept)] = True
        last, counts_L = up([np.array([way[-1] for way in kept], np.int64), counts])
        return last, counts_L

    def _way(self, position: int) -> list[int]:
        """The positions from its row's first to this one."""
        way = [position]
        while (before := int(self.parents[way[-1]])) >= 0:
            way.append(before)
        return way[::-1]
