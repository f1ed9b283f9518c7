"""Which rows of a step begin with the same pages, and whether attending to those once for all of them saves time.

A backend that can do so says what it costs (`Sharing`); `find` decides for one step, from page tables on the host.
Sharing rows form a tree: all begin with the system prompt, some go on with the same document. A row is in one group, so
a group is split where its parts save more than the whole.

Legend: R rows, P pages of a row, G groups, M new tokens of sharing rows, T new tokens of all rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Ints = NDArray[np.int32]
    Rows = NDArray[np.int64]

MOST_GROUPS = 64
MOST_TOKENS = 512  # of sharing rows, in a step that is no decode step: parts of the softmax are kept for each of them
LEAST_TOKENS = 128  # a shorter beginning is not worth a tile
BLOCK = 64  # tokens that a kernel reads at a time: a part has whole blocks
LEAST_PART = 4 * BLOCK
# Bytes that reading them again costs about as long as one more kernel launch, at the rate of a large GPU's memory.
LAUNCH_BYTES = 8 * 2**20


@dataclass(frozen=True, slots=True)
class Sharing:
    """What attending to shared pages once costs on a backend."""

    tile: int  # new tokens that are packed into one tile; a row with more fills tiles of its own
    programs: int  # tiles and parts of the shared pages that fill the device
    splits: tuple[int, int]  # most parts of a group's pages: in a decode step, and in others
    token_bytes: int  # keys and values of one token in one layer
    part_bytes: int  # one part of the softmax for one new token in one layer


@dataclass(frozen=True, slots=True)
class Shared:
    """The groups of one step, as host arrays; `kernels.calls.SharedPages` says what they mean."""

    lens: Ints  # [R]
    group_start: Ints  # [G + 1]
    groups: Ints  # [G, 3]
    members: Ints  # [M]
    positions: Ints  # [M]
    places: Ints  # [T]

    @property
    def arrays(self) -> list[NDArray[np.int32]]:
        return [self.lens, self.group_start, self.groups, self.members, self.positions, self.places]

    def padded(self, rows: int) -> list[NDArray[np.int32]]:
        """The arrays of a decode step of so many rows, with room for `most_groups(rows)` groups."""
        more = most_groups(rows) - len(self.groups)
        start = np.concatenate([self.group_start, np.full(more, self.group_start[-1], np.int32)])
        groups = np.concatenate([self.groups, np.zeros((more, 3), np.int32)])
        return [_longer(self.lens, rows), start, groups, *(_longer(array, rows) for array in self.arrays[3:])]


def most_groups(rows: int) -> int:
    """Groups that a step of so many rows may have."""
    return min(MOST_GROUPS, rows // 2)


def fixed_sizes(rows: int) -> list[tuple[int, ...]]:
    """Shapes of a recorded decode step's arrays."""
    groups = most_groups(rows)
    return [(rows,), (groups + 1,), (groups, 3), (rows,), (rows,), (rows,)]


def _longer(array: Ints, size: int) -> Ints:
    return np.concatenate([array, np.zeros(size - len(array), np.int32)])


def find(table_RP: Ints, query_R: Ints, prefix_R: Ints, page_size: int, window: int, sharing: Sharing) -> Shared | None:
    """The groups of a step, or None where sharing saves nothing.

    What is shared was computed before the step: whole pages of every sharing row's prefix. `window`: tokens behind it
    are not read; a row that has left pages behind shares nothing.
    """
    rows = np.flatnonzero((query_R <= sharing.tile) & (prefix_R >= LEAST_TOKENS) & (table_RP[:, 0] != 0))
    if len(rows) < 2:
        return None
    single = len(query_R) == int(query_R.sum())
    if not single:
        rows = rows[np.cumsum(query_R[rows]) <= MOST_TOKENS]
    full_R = prefix_R // page_size
    found = _split(table_RP, full_R, _alike(rows, table_RP[rows, 0]), window // page_size, LEAST_TOKENS // page_size)
    if not found:
        return None
    found.sort(key=lambda group: -group[1])
    found = found[: most_groups(len(query_R))]
    return _worthwhile(found, query_R, prefix_R, page_size, sharing)


def _alike(rows: Rows, pages: Ints) -> list[Rows]:
    """Rows with the same page, where there are several."""
    order = np.argsort(pages, kind="stable")
    edges = np.flatnonzero(np.diff(pages[order])) + 1
    return [part for part in np.split(rows[order], edges) if len(part) > 1]


def _split(table_RP: Ints, full_R: Ints, parts: list[Rows], window: int, least: int) -> list[tuple[Rows, int, int]]:
    """(Rows, saved pages, shared pages) of the groups that save most, of each of the parts or of parts of it."""
    found: list[tuple[Rows, int, int]] = []
    for rows in parts:
        limit = int(full_R[rows].min())
        differs = np.flatnonzero((table_RP[rows, :limit] != table_RP[rows[0], :limit]).any(0))
        shared = int(differs[0]) if len(differs) else limit
        read = shared if not window else shared - max(int(full_R[rows].max()) - window, 0)
        whole = (rows, (len(rows) - 1) * read, shared)
        longer = rows[full_R[rows] > shared]
        below: list[tuple[Rows, int, int]] = []
        if len(longer) > 1:
            below = _split(table_RP, full_R, _alike(longer, table_RP[longer, shared]), window, least)
        if sum(group[1] for group in below) > whole[1]:
            found += below
        elif read >= least:
            found.append(whole)
    return found


def _worthwhile(
    found: list[tuple[Rows, int, int]], query_R: Ints, prefix_R: Ints, page_size: int, sharing: Sharing
) -> Shared | None:
    counts = np.array([int(query_R[rows].sum()) for rows, _, _ in found])
    tiles = int((-(-counts // sharing.tile)).sum())
    most = sharing.splits[0 if len(query_R) == int(query_R.sum()) else 1]
    splits = max(1, min(most, sharing.programs // tiles))
    groups = np.zeros((len(found), 3), np.int32)
    cost, saved = 2 * LAUNCH_BYTES, 0
    for place, (rows, pages, shared) in enumerate(found):
        tokens = shared * page_size
        size = max(LEAST_PART, -(-tokens // splits // BLOCK) * BLOCK)
        groups[place] = rows[0], tokens, size
        saved += pages * page_size * sharing.token_bytes
        # Parts are written, and read again.
        cost += 2 * int(counts[place]) * -(-tokens // size) * sharing.part_bytes
    return _arrays(found, groups, query_R, prefix_R) if saved > cost else None


def _arrays(found: list[tuple[Rows, int, int]], groups: Ints, query_R: Ints, prefix_R: Ints) -> Shared:
    rows = np.concatenate([part for part, _, _ in found])
    lens = np.zeros(len(query_R), np.int32)
    lens[rows] = np.repeat(groups[:, 1], [len(part) for part, _, _ in found])
    starts = np.cumsum(query_R) - query_R
    counts = query_R[rows]
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    members = (np.repeat(starts[rows], counts) + within).astype(np.int32)
    positions = (np.repeat(prefix_R[rows], counts) + within).astype(np.int32)
    places = np.full(int(query_R.sum()), -1, np.int32)
    places[members] = np.arange(len(members), dtype=np.int32)
    sizes = [int(query_R[part].sum()) for part, _, _ in found]
    return Shared(lens, np.cumsum([0, *sizes]).astype(np.int32), groups, members, positions, places)
