"""What is done next: pure, like the planner of texts. Encode and decode stand between steps, never inside one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from phloem.diffusion.request import Stage

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from phloem.diffusion.request import Job


@dataclass(frozen=True)
class Item:
    """One piece of work: a stage of these jobs; more than one only of a step."""

    stage: Stage
    jobs: list[Job]


# The smallest comes first. `fcfs` brings the oldest to its end; `shortest` the one with the least work left, so that a
# small picture does not wait behind a large one, which may wait as long as small ones come. `fair` takes the oldest of
# the client that has had the least, step by step (`Shares`).
POLICIES: dict[str, Callable[[Job], tuple[float, ...]]] = {
    "fcfs": lambda job: (job.number,),
    "shortest": lambda job: (job.left, job.number),
    "fair": lambda job: (job.served, job.number),
}


class Shares:
    """Latent tokens that were computed for each client, as far as they say whose turn it is.

    A client that comes, or comes back, begins where the one stands that was served last: being idle is not saved up.
    """

    def __init__(self) -> None:
        self._served: dict[str, float] = {}
        self._level = 0.0

    def rank(self, jobs: Sequence[Job]) -> None:
        """Tell jobs what their clients have had."""
        here = {job.draw.client for job in jobs}
        self._served = {name: self._served.get(name, self._level) for name in here}
        for job in jobs:
            job.served = self._served[job.draw.client]

    def charge(self, item: Item) -> None:
        """What is done next; between steps nothing counts."""
        if item.stage not in (Stage.DENOISE, Stage.WHOLE):
            return
        self._level = min(self._served[job.draw.client] for job in item.jobs)
        for job in item.jobs:
            self._served[job.draw.client] += job.tokens * (job.steps if item.stage is Stage.WHOLE else 1)


def next_item(jobs: Sequence[Job], budget: int, policy: str, most: int) -> Item | None:
    """The next piece of work.

    Args:
        jobs: all that are not finished.
        budget: latent tokens of one step; the first job of a step is taken whatever it has.
        policy: a key of POLICIES.
        most: jobs that may be past their encoding at the same time.

    What is finished but for its pixels goes first: nothing else has less left to do and more memory to give back. Then
    new ones are encoded, so that they join at the next step.
    """
    ordered = sorted(jobs, key=POLICIES[policy])
    by_stage = {stage: [job for job in ordered if job.stage is stage] for stage in Stage}
    if by_stage[Stage.DECODE]:
        return Item(Stage.DECODE, by_stage[Stage.DECODE][:1])
    running, waiting = by_stage[Stage.DENOISE], by_stage[Stage.ENCODE]
    if waiting and len(running) < most:
        return Item(Stage.ENCODE, waiting[:1])
    if running:
        return Item(Stage.DENOISE, _fill(running, budget))
    whole = by_stage[Stage.WHOLE]
    return Item(Stage.WHOLE, whole[:1]) if whole else None


def _fill(running: list[Job], budget: int) -> list[Job]:
    first, left = running[0], budget - running[0].tokens
    found = [first]
    for job in running[1:]:
        if not (first.alone or job.alone) and job.key == first.key and job.tokens <= left:
            found.append(job)
            left -= job.tokens
    return found
