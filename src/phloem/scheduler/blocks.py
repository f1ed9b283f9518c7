"""What a step computes of requests that are written block by block: known blocks, and canvases behind them.

Computed chases known here too, in whole blocks: a request's known blocks are computed, whole chunks of a prompt at
once, and where none is left out its canvas stands behind them, with what is known of that block. A canvas's keys and
values are scratch that the next pass overwrites; they count as computed when its tokens are known and have been
computed once more, as the known block of a later step. Where a text is seen whole (`WHOLE`), it is one canvas from its
first token to its limit, and nothing of it ever counts as computed. Where known tokens are seen from left to right
(`core.renoising`), they are blocks of one, and a canvas is as large as it is wherever it begins.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from phloem.core.denoising import WHOLE
from phloem.scheduler.plan import KEPT, Chunk, Spent, page_after

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from phloem.kvcache.manager import CacheManager, Lease
    from phloem.scheduler.plan import Means
    from phloem.scheduler.state import Request, Slots

_NOBODY = np.empty(0, dtype=np.int32)


def whole(length: int, block: int) -> int:
    """Tokens of the whole blocks among so many: those before the canvas."""
    return length // block * block


def canvas_of(request: Request, canvas: int) -> int:
    """Places of a request's canvas."""
    return request.limit if canvas == WHOLE else canvas


def reach(request: Request, length: int, slots: Slots) -> int:
    """Positions of a request of which so much is known, with its canvas."""
    return whole(length, slots.block) + canvas_of(request, slots.canvas)


def spend_blocks(slots: Slots, waiting: Iterable[Chunk], means: Means) -> Spent:
    """As `plan.spend`, of canvases first, then of prompts that have begun, then of waiting ones."""
    active = slots.active()
    if means.resting:
        active = active[[slot not in means.resting for slot in active.tolist()]]
    spent = Spent(_NOBODY, _NOBODY)
    purse = _Purse(slots, min(means.pace.budget, means.most), means.pages)
    todo = slots.length[active] // slots.block * slots.block - slots.computed[active]
    if not _go_on(spent, slots, active[todo <= slots.canvas], purse):
        return spent
    prompts, entering = active[todo > slots.canvas], bool(means.entries and means.queued)
    kept = purse.left // KEPT if len(prompts) and entering else 0
    purse.left -= kept
    if not _go_on(spent, slots, prompts, purse):
        return spent
    purse.left += kept
    if entering:
        _let_in(spent, slots, waiting, means, purse)
    return spent


class _Purse:
    """Tokens and pages of a step."""

    def __init__(self, slots: Slots, left: int, pages: int) -> None:
        self.left, self.pages = left, pages
        self._block, self._canvas, self._size = slots.block, slots.canvas, slots.page_size
        self.used = False

    def chunk(self, request: Request, start: int, known: int) -> tuple[int, int]:
        """(Known tokens from `start` on, canvas) that can be paid, of a text of which so much is known. The first of a
        step gets a block, or its last one with a canvas, in any case: no step can be smaller."""
        block, rest = self._block, whole(known, self._block) - start
        canvas = canvas_of(request, self._canvas)
        least = 0 if self.used else rest + canvas if rest <= self._canvas else block
        left = max(self.left, least)
        if rest + canvas <= left:
            return rest, canvas
        return min(rest, left // block * block), 0

    def missing(self, end: int, covered: int) -> int:
        return max(0, -(-(end - covered) // self._size))

    def pay(self, tokens: int, pages: int) -> None:
        self.left -= tokens
        self.pages -= pages
        self.used = True


def _go_on(spent: Spent, slots: Slots, some: NDArray[np.int32], purse: _Purse) -> bool:
    """Running requests in their order. False: the next one has no pages."""
    for slot in sorted(some.tolist(), key=lambda slot: slots.at(slot).place):
        request, start = slots.at(slot), int(slots.computed[slot])
        count, canvas = purse.chunk(request, start, int(slots.length[slot]))
        if not count + canvas:
            return True
        end, covered = start + count + canvas, int(slots.covered[slot])
        pages = purse.missing(end, covered)
        if pages > purse.pages:
            spent.lacking = [request]
            return False
        purse.pay(count + canvas, pages)
        spent.chunks.append(Chunk(request, request.known, start, count, canvas=canvas))
    return True


def _let_in(spent: Spent, slots: Slots, waiting: Iterable[Chunk], means: Means, purse: _Purse) -> None:
    """Waiting requests, while there are tokens and pages. One whose next page is computed in this step waits for it;
    none overtakes one that has no pages."""
    size, entries, alone = slots.page_size, means.entries, slots.num_running == 0
    promised = spent.promised = _promised(slots, means)
    computing: dict[tuple[str, int, bytes], NDArray[np.int32]] = {}
    for chunk in spent.chunks:
        if chunk.count:
            shared = slots.lease(chunk.request.slot).shared * size
            computing[page_after(chunk.known, shared, size, chunk.request.namespace)] = chunk.known
    for want in waiting:
        if not entries:
            break
        page = page_after(want.known, want.start, size, want.request.namespace)
        same = want.start + size
        if want.sharable and page in computing and np.array_equal(computing[page][:same], want.known[:same]):
            continue
        if not alone and want.pages > purse.pages - promised:
            break
        want.count, want.canvas = purse.chunk(want.request, want.start, len(want.known))
        if not want.count + want.canvas:
            break
        spent.entries.append(want)
        purse.pay(want.count + want.canvas, want.pages)
        promised += -(-int(want.growth * means.share) // size)
        if want.count:
            computing[page] = want.known
        entries, alone = entries - 1, False


def _promised(slots: Slots, means: Means) -> int:
    """Pages that running requests will want: for what is known of them, and a share of what is to come."""
    staying = slots.staying()
    if not len(staying):
        return 0
    length, limit = slots.length[staying], slots.limit[staying]
    ends = limit if slots.block == WHOLE else length + slots.canvas
    missing = np.maximum(0, -(-(ends - slots.covered[staying]) // slots.page_size))
    if slots.block == WHOLE:
        return int(missing.sum())
    growth = int(np.maximum(limit - length, 0).sum() * means.share)
    return int(missing.sum()) + -(-growth // slots.page_size)


def cover(cache: CacheManager, block: int, chunk: Chunk, lease: Lease) -> None:
    """Pages for the chunk and its canvas, or for less of it: then it is shortened, to nothing at worst."""
    while chunk.count + chunk.canvas and not cache.reserve(lease, chunk.start + chunk.count + chunk.canvas):
        if chunk.canvas:
            chunk.canvas = 0
        else:
            chunk.count = whole(chunk.count // 2, block)


def from_cached(chunk: Chunk, cached: int, slots: Slots) -> None:
    """The chunk of a request that enters, of which so many tokens turned out to be cached."""
    rest = whole(len(chunk.known), slots.block) - cached
    chunk.start, chunk.count = cached, max(0, min(rest, chunk.count))
    if chunk.count < rest:
        chunk.canvas = 0
    elif not chunk.count:
        chunk.canvas = canvas_of(chunk.request, slots.canvas)


def assembled(slots: Slots, chunks: list[Chunk]) -> tuple[NDArray[np.int32], list[NDArray[np.int32]]]:
    """([R] the canvas of each row, the tokens of each row); what of a canvas is not known is the runner's to say."""
    canvas = np.array([chunk.canvas for chunk in chunks], dtype=np.int32)
    ids: list[NDArray[np.int32]] = []
    for chunk in chunks:
        row = np.zeros(chunk.count + chunk.canvas, dtype=np.int32)
        known = chunk.known[chunk.start : chunk.start + len(row)]
        row[: len(known)] = known
        ids.append(row)
    return canvas, ids
