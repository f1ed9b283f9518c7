"""Step graphs of ranks that have a device each, and meet within a step: all have the graph of a size, or none has it.

A graph holds the sums over ranks, as its padded size has them: a rank that replays it beside one that runs the step
eagerly would wait for ever. So the first rank says which sizes are recorded, and when (`parallel.Capture`), and of each
step by which graph it runs, if by any (`parallel.Go`). To record a step is to run it once, in which all meet, and then
to capture it, in which nothing runs. All ranks begin that together, and behind it tell each other on the host whether
it went well. One that fails within the capture costs that size on all ranks. One that fails within the run before has
left the others in the middle of it: it ends, and with it all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import torch

from phloem.core.errors import EngineDead
from phloem.engine.memory import first_line, is_out_of_memory
from phloem.kernels.graph import RecordError, RecordingEnded

if TYPE_CHECKING:
    from collections.abc import Callable

    from phloem.distributed.comm import Comm
    from phloem.kernels.graph import Cut, GraphRecorder, StepGraph

T = TypeVar("T")

_WELL, _FAILED, _FULL = 0, 1, 2  # what ranks say of a recording


class AgreedRecorder:
    """A recorder whose recordings are made on all ranks, or count on none (`kernels.graph.GraphRecorder`).

    `budget`: bytes that they may take on this rank; None: no bound.
    """

    resizes = False

    def __init__(self, recorder: GraphRecorder, comm: Comm, budget: int | None = None) -> None:
        self.cuts, self._recorder, self._comm = recorder.cuts, recorder, comm
        self._budget, self._taken = budget, 0

    def record(self, fn: Callable[[], T]) -> tuple[StepGraph, T]:
        return self._jointly(self._recorder.record, fn)

    def record_pieces(self, fn: Callable[[Cut], T]) -> tuple[StepGraph, T]:
        return self._jointly(self._recorder.record_pieces, fn)

    def record_sizes(self, fn: Callable[[tuple[int, ...]], T], sizes: tuple[int, ...]) -> tuple[StepGraph, T]:
        raise RecordError("ranks agree on sizes one by one")

    def _jointly(self, record: Callable[[Any], Any], fn: Callable[..., Any]) -> Any:
        ran, failure = False, None
        made: Any = None

        def counted(*given: Any) -> Any:
            nonlocal ran
            result = fn(*given)
            ran = True
            return result

        try:
            made = record(counted)
        except Exception as error:
            if not ran or not (isinstance(error, RecordError) or is_out_of_memory(error)):
                self._lose(error)
            failure = error
        full = self._budget is not None and self._taken >= self._budget
        said = _FAILED if failure is not None else _FULL if full else _WELL
        all_said = [int(one) for one in self._comm.host.all_gather(torch.tensor([said]))]
        if failure is not None:
            raise failure
        for rank, word in enumerate(all_said):
            if word != _WELL:
                why = "failed to record it" if word == _FAILED else "has no more memory for graphs"
                raise RecordError(f"rank {rank} {why}")
        self._taken += made[0].bytes
        return made

    def _lose(self, error: Exception) -> None:
        """The others wait within the step. Raises: on the first rank, where nobody may be asking for a step, what ends
        recording; the next step finds the group ended. On another rank what ends that rank, of which all are told."""
        why = f"rank {self._comm.rank} failed in a step that was to be recorded: {first_line(error)}"
        self._comm.abort()
        if self._comm.rank:
            raise EngineDead(why) from None
        raise RecordingEnded(why) from None
