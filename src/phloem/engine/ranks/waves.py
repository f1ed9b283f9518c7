"""Steps of a pipeline of stages: the first one begins a step while those behind have others.

A step's tokens are chosen when its states have come back (`Flight.land`); until then steps of other requests begin.
What follows from a token waits for it: before a step with a row whose token is still to come all in flight land.

Legend: L positions that yield, N hidden size.
"""

from __future__ import annotations

from collections import deque
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import numpy as np

from phloem.engine.pipeline import Flight
from phloem.engine.sampling.answer import empty, give_out, keep_hidden
from phloem.engine.sampling.choose import Choice, kind_of
from phloem.engine.wanted import Wanted

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

    from numpy.typing import NDArray
    from torch import Tensor

    from phloem.core.batch import Batch, StepOutput
    from phloem.engine.inputs import Step
    from phloem.engine.ranks.stages import Kind
    from phloem.engine.sampling.choose import Chooser
    from phloem.engine.sampling.masks import Masks
    from phloem.engine.sampling.slots import Slots
    from phloem.engine.transfer import LastTokens


@runtime_checkable
class Starts(Protocol):
    """The first stage (`parallel.Leading`)."""

    ahead: int  # steps that others may still have while one is begun

    @property
    def busy(self) -> float: ...  # seconds in which it has computed

    def start(self, step: Step, kind: Kind | Literal[""], /) -> Future[Any]: ...

    def landed(self, coming: Future[Any], /) -> tuple[Tensor, Tensor]: ...

    def hand(self, kind: Kind, found: Tensor, /) -> None: ...


@runtime_checkable
class Heads(Protocol):
    """What computes states and heads on several ranks (`parallel.Leading`)."""

    def expect(self, kind: Kind | Literal[""], /) -> None: ...

    @property
    def spread(self) -> Callable[[Tensor], object] | None: ...  # as `LastTokens.spread`


class Waves:
    """Begins such steps, and ends them in their order.

    Args:
        make: the step of a batch.
    """

    def __init__(
        self,
        first: Starts,
        make: Callable[[Batch, Wanted], Step],
        slots: Slots,
        masks: Masks,
        last: LastTokens,
        chooser: Chooser,
    ) -> None:
        self._first, self._make, self.most = first, make, first.ahead + 1
        self._slots, self._masks, self._last, self._chooser = slots, masks, last, chooser
        self._flying: deque[NDArray[np.int32]] = deque()  # the slots whose tokens are to come

    @property
    def busy(self) -> float:
        """Seconds in which the first stage has computed."""
        return self._first.busy

    @staticmethod
    def takes(batch: Batch) -> bool:
        """Whether the head is asked at most once, for what the step yields."""
        return batch.places is None and batch.drafting is None and not batch.prompt_targets

    def waits(self, batch: Batch) -> bool:
        """Whether the step must not begin before those in flight have landed."""
        if not self._flying:
            return False
        if batch.prompt_targets or batch.places is not None or batch.drafting is not None:
            return True
        return any(np.isin(batch.slots, slots).any() for slots in self._flying)

    def begin(self, batch: Batch, start: float) -> Flight:
        """Of a batch that is taken; its requests have been admitted."""
        wanted, output = Wanted.of(batch), empty(batch)
        output.drafted = wanted.drafted
        easy = bool(self._slots.easy[wanted.slots].all())
        slots = [] if easy else [self._slots[slot] for slot in wanted.slots.tolist()]
        kind = kind_of(self._slots, wanted, easy) if len(wanted.at) else ""
        before, busy = perf_counter(), self.busy
        coming = self._first.start(self._make(batch, wanted), kind)
        output.stage_seconds = self.busy - busy
        self._flying.append(wanted.slots)

        def land() -> StepOutput:
            self._flying.popleft()
            hidden_LN, found = self._first.landed(coming)
            if not kind:  # a chunk, which all stages have done by now
                output.forward_seconds = perf_counter() - before
                output.total_seconds = perf_counter() - start
                return output
            self._masks.begin(slots, wanted)
            self._first.hand(kind, found)
            choice = Choice(wanted, slots, easy, hidden_LN, output, before)
            chosen = self._chooser.run(choice)
            for one in (*choice.late, *keep_hidden(output, wanted, slots, hidden_LN, self._last.down)):
                one.land()
            give_out(output, wanted, slots, chosen)
            output.total_seconds = perf_counter() - start
            return output

        return Flight(land, coming.done)
