"""Batches: of what was decided for a step, or of the step before it, one token on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from phloem.core.batch import FROM_DEVICE, Admission, Batch
from phloem.scheduler.blocks import assembled
from phloem.scheduler.plan import Plan
from phloem.scheduler.state import Entry

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from phloem.kvcache.manager import CacheManager
    from phloem.scheduler.plan import Chunk, Spent
    from phloem.scheduler.state import Request, Slots


def entry(request: Request, known: NDArray[np.int32], eos_ids: tuple[int, ...]) -> Entry:
    """The request enters its slot, for the first time or again, with these tokens."""
    submit, params, constraint = request.submit, request.params, request.constraint
    ends = (() if params.ignore_eos else eos_ids) + tuple(params.stop_token_ids)
    follower = None if constraint is None else constraint.follower(request.output)
    admission = Admission(
        slot=request.slot,
        request_id=request.id,
        params=params,
        seed=request.seed,
        tokens=known,
        num_prompt=request.num_prompt,
        eos_ids=ends if follower is None else (),  # masks keep `min_new_tokens`, where the constraint allows
        return_logprob=submit.return_logprob,
        top_logprobs=submit.top_logprobs,
        token_ids_logprob=tuple(submit.token_ids_logprob),
        return_hidden=submit.return_hidden,
        return_routed=submit.return_routed,
        second=submit.second,
        namespace=request.namespace,
        audio=submit.audio,
        align=submit.align,
        media=tuple(submit.media),
        constrained=follower is not None,
    )
    return Entry(admission, follower)


def assemble(slots: Slots, spent: Spent, entered: Sequence[tuple[Chunk, Entry]], step: int, epoch: int) -> Plan:
    """What was spent as a batch. Whoever the runner must be told of again is told with it."""
    decodes = spent.decodes
    chunks = [*spent.chunks, *(chunk for chunk, _ in entered)]
    prefills = [chunk.request for chunk in chunks]
    rows = [slots.at(slot) for slot in decodes.tolist()] + prefills
    at = np.concatenate([decodes, np.array([request.slot for request in prefills], dtype=np.int32)])
    query_lens = np.ones(len(rows), dtype=np.int32)
    query_lens[len(decodes) :] = [chunk.count + chunk.canvas for chunk in chunks]
    prefix_lens = slots.computed[at]
    ends = prefix_lens + query_lens
    longest = int(ends.max())
    drafts = None
    behind = [chunk.room for chunk in chunks]
    if (spent.room is not None and spent.room.any()) or any(behind):
        drafts = np.zeros(len(rows), dtype=np.int32)
        drafts[: len(decodes)] = 0 if spent.room is None else spent.room
        drafts[len(decodes) :] = behind
        longest = int((ends + drafts).max())
    canvas, outputs = None, ((ends == slots.length[at]) & slots.samples[at]).astype(np.int32)
    if slots.block:
        canvas, ids = assembled(slots, chunks)
        outputs = np.zeros(len(rows), dtype=np.int32)
    else:
        ids = [slots.next_token[decodes]] + [chunk.known[chunk.start : chunk.start + chunk.count] for chunk in chunks]
    targets: dict[int, NDArray[np.int32]] = {}
    for row, chunk in enumerate(chunks, start=len(decodes)):
        found = _targets(chunk.request, chunk.start, chunk.count)
        if found is not None:
            targets[row] = found
    told = [slots.readmit.pop(slot) for slot in at.tolist() if slot in slots.readmit] if slots.readmit else []
    told += [item for _, item in entered]
    batch = Batch(
        step=step,
        slots=at,
        query_lens=query_lens,
        prefix_lens=prefix_lens,
        input_ids=np.concatenate(ids),
        tables=slots.gather(at, longest),
        outputs=outputs,
        admissions=[item.admission for item in told],
        prompt_targets=targets,
        drafts=drafts,
        adapters=slots.adapters(at),
        canvas=canvas,
        epoch=epoch,
    )
    followers = [(item.admission.slot, item.follower) for item in told if item.follower is not None]
    return Plan(batch, rows, prefills, [chunk.request for chunk, _ in entered], followers)


def _targets(request: Request, start: int, count: int) -> NDArray[np.int32] | None:
    """For new positions start..start+count: the prompt token after each, or -1 where its logprob is not wanted."""
    if not request.wants_prompt or start + count < request.targets_from or start + 1 >= request.num_prompt:
        return None
    targets = np.full(count, -1, dtype=np.int32)
    first = max(start + 1, request.targets_from)
    last = min(start + count + 1, request.num_prompt)
    if first < last:
        targets[first - start - 1 : last - start - 1] = request.prompt[first:last]
    return targets


@dataclass(slots=True)
class Steady:
    """The rows of a launched step that only decoded. While nobody comes or goes the next has the same, one token on."""

    active: NDArray[np.int32]  # the slots; another array (`Slots.active`) means other rows
    rows: list[Request]
    query_lens: NDArray[np.int32]
    outputs: NDArray[np.int32]
    adapters: NDArray[np.int32] | None
    tables: tuple[NDArray[np.int32], ...]
    pages: int  # that these tables are wide
    covered: NDArray[np.int32]  # positions that each row has pages for
    longest: int  # tokens of the longest row, with the one that is computed next
    left: int  # steps until a row comes to its end

    @staticmethod
    def after(plan: Plan, slots: Slots) -> Steady | None:
        """What goes on from a step that only decoded and has been launched; None where the next one is not alike."""
        batch = plan.batch
        active, at = slots.active(), batch.slots
        if len(at) != len(active):
            return None
        longest = int(slots.computed[at].max()) + 1
        return Steady(
            active=active,
            rows=plan.rows,
            query_lens=batch.query_lens,
            outputs=batch.outputs,
            adapters=batch.adapters,
            tables=batch.tables,
            pages=-(-(longest - 1) // slots.page_size),
            covered=slots.covered[at],
            longest=longest,
            left=int((slots.limit[at] - slots.length[at]).min()) - 1,
        )

    def next(self, slots: Slots, cache: CacheManager, step: int, epoch: int) -> Plan | None:
        """The next step; None, and nothing is changed, where its pages must be taken from others."""
        active = self.active
        computed = slots.computed[active]
        needy = np.flatnonzero(computed >= self.covered)
        if len(needy):
            if not cache.reserve_one_each([slots.lease(slot) for slot in active[needy].tolist()]):
                return None
            slots.covered[active[needy]] += slots.page_size
            self.covered = slots.covered[active]
        pages = -(-self.longest // slots.page_size)
        if len(needy) or pages != self.pages or slots.moved:
            self.tables, self.pages = slots.gather(active, self.longest), pages
        batch = Batch(
            step=step,
            slots=active,
            query_lens=self.query_lens,
            prefix_lens=computed,
            input_ids=slots.next_token[active],
            tables=self.tables,
            outputs=self.outputs,
            adapters=self.adapters,
            epoch=epoch,
        )
        return Plan(batch, self.rows, steady=True)

    def launched(self, slots: Slots) -> None:
        """The step that `next` gave runs: every row is one token on."""
        slots.computed[self.active] += 1
        slots.length[self.active] += 1
        slots.next_token[self.active] = FROM_DEVICE
        self.longest += 1
        self.left -= 1
