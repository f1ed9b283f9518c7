"""What was done for requests whose spans somebody wants; for all others nothing is kept.

A decode server's arrivals add what was fetched for them (`disagg/arrivals.py`). Times are of the scheduler's clock,
which is the machine's: the door, which makes spans of them, has the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from phloem.scheduler.plan import Plan
    from phloem.scheduler.state import Request

CHUNK = "prefill_chunk"  # a step that computed tokens of its prompt
WAIT = "wait"  # for what comes late: a grammar, an adapter, pages of a store or of a prefill server


def step(plan: Plan, begun: float, ended: float) -> None:
    """A step is done, and its results are about to be told."""
    first = len(plan.rows) - len(plan.prefills)
    for row, request in enumerate(plan.prefills, start=first):
        if request.did is not None and not request.finished:
            request.did.append((CHUNK, begun, ended, int(plan.batch.query_lens[row])))


def waited(request: Request, now: float) -> None:
    if request.did is not None:
        request.did.append((WAIT, request.received, now, 0))
