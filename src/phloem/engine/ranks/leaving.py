"""How all ranks of a model leave a step for which one of them has no memory.

Ranks that meet within a layer leave it by the memory that they share (`distributed.comm.Undoing`). Stages of a pipeline
meet in pairs: each is given something by the one before and gives something to the next, once a step, also where it is
but the word that the step never happened. So the first rank hears of it, and no pair gets out of step.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from phloem.distributed.comm import StepUndone
from phloem.distributed.groups import give, take

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from phloem.distributed.comm import Comm, Undoing
    from phloem.distributed.groups import Groups


class Alone:
    """`distributed.comm.Undoing` of a rank that meets nobody within a layer."""

    def __init__(self) -> None:
        self.count = self._known = 0

    def undo(self) -> None:
        self.count = max(self.count, self._known + 1)

    def resume(self, count: int) -> None:
        self.count, self._known = max(self.count, count), max(self._known, count)


class Jointly:
    """The same of a rank in several groups, the first of which has all ranks: whoever waits in any of them leaves, and
    makes those leave who wait for it in another."""

    def __init__(self, parts: Sequence[Undoing]) -> None:
        self._parts = parts

    @property
    def count(self) -> int:
        return self._parts[0].count

    def undo(self) -> None:
        for part in self._parts:
            part.undo()

    def resume(self, count: int) -> None:
        for part in self._parts:
            part.resume(count)


def undoing_of(comms: Sequence[Comm | None]) -> Undoing | None:
    """Of a rank in these groups; None: in one of them nobody can leave a step."""
    parts = [comm.undoing for comm in comms if comm is not None]
    found = [part for part in parts if part is not None]
    if len(found) < len(parts):
        return None
    return Alone() if not found else found[0] if len(found) == 1 else Jointly(found)


class Links:
    """What a rank of a pipeline owes its neighbours in a step."""

    def __init__(self, groups: Groups) -> None:
        up = groups.up
        self._before = groups.before
        self._next = groups.after or (up if up is not None and up.rank == 0 else None)
        self._up = up if up is not None and up.rank else None  # of rank 0
        self._took = self._gave = self._heard = True

    def begin(self, *, hears: bool = True) -> None:
        """A step was told. `hears`: of rank 0, whether what comes of it is waited for in the step."""
        self._took, self._gave, self._heard = self._before is None, self._next is None, self._up is None or not hears

    def answers(self) -> None:
        """Of the last stage: something more is asked for the step that has run."""
        self._gave = self._next is None

    def take(self) -> list[Tensor]:
        """What the stage before gives; nothing on the first one. Raises StepUndone."""
        if self._before is None:
            return []
        self._took = True
        return take(self._before)

    def give(self, tensors: list[Tensor]) -> None:
        """To the next stage; from the last one's first rank to rank 0."""
        if self._next is not None:
            give(self._next, tensors)
        self._gave = True

    def hear(self) -> list[Tensor]:
        """On rank 0, what the last stage gives. Raises StepUndone."""
        assert self._up is not None
        self._heard = True
        return take(self._up)

    def leave(self) -> None:
        """The rest of a step that never happened."""
        if not self._took:
            with contextlib.suppress(StepUndone):
                self.take()
        if not self._gave:
            self._gave = True
            if self._next is not None:
                give(self._next, None)
        if not self._heard:
            with contextlib.suppress(StepUndone):
                self.hear()
