"""Which steps are recorded, when, and which graph serves a step; the same policy for every kind and device.

A graph holds a step of a fixed size (a bucket), of rows or of tokens; a smaller step is padded to it, unless the graph
is one that runs smaller ones. Nothing is recorded before the engine can answer: a bucket is recorded when it has been
wanted often enough, or while the engine is idle, the likely ones first. Until then, and wherever recording fails, steps
run eagerly.
"""

from __future__ import annotations

import bisect
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

from phloem.engine.memory import is_out_of_memory
from phloem.kernels.graph import RecordError
from phloem.utils import log

if TYPE_CHECKING:
    from collections.abc import Callable

    from phloem.kernels.graph import StepGraph

_log = log.get("engine.recorded")

I = TypeVar("I")  # noqa: E741 - the step's inputs
O = TypeVar("O")  # noqa: E741 - what the step gives


def bucket_sizes(limit: int) -> list[int]:
    """Row counts with a graph of their own: four to an octave, so that less than a quarter of a step is padding.

    1 to 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, ... and `limit` itself.
    """
    sizes: list[int] = []
    size = 1
    while size < limit:
        sizes.append(size)
        size += max(1, (1 << (size.bit_length() - 1)) // 4)
    return [*sizes, limit] if limit > 0 else []


@dataclass(slots=True)
class RecordedStep(Generic[I, O]):
    """A bucket's graph with its fixed buffers: write `inputs`, `replay`, read `outputs`."""

    size: int
    inputs: I
    outputs: O
    graph: StepGraph

    def replay(self, *sizes: int) -> O:
        self.graph.replay(*sizes)
        return self.outputs


class StepGraphs(Generic[I, O]):
    """The graphs of one runner. Used by the runner's thread alone.

    Args:
        limit: the largest size of a step.
        make: records the step of a bucket, over fixed inputs that must be valid as they come (every row on page 0),
            because recording may run it. Gives the inputs, the graph and its outputs. Raises `RecordError`.
        patience: record a bucket when it has been wanted this many times.
        budget: bytes that all graphs together may take; None for no bound.
        sizes: the buckets; default `bucket_sizes(limit)`.
        unit: what a bucket counts.
    """

    def __init__(
        self,
        limit: int,
        make: Callable[[int], tuple[I, StepGraph, O]],
        *,
        patience: int = 2,
        budget: int | None = None,
        sizes: list[int] | None = None,
        unit: str = "rows",
    ) -> None:
        self.sizes = sizes if sizes is not None else bucket_sizes(limit)
        self.refused: str | None = None  # why nothing more is recorded
        self._make = make
        self._patience = patience
        self._budget = budget
        self._unit = unit
        self._steps: dict[int, RecordedStep[I, O]] = {}
        self._wanted: Counter[int] = Counter()

    def bucket(self, rows: int) -> int | None:
        """The least bucket that holds `rows`, or None where there is none."""
        place = bisect.bisect_left(self.sizes, rows)
        return self.sizes[place] if rows > 0 and place < len(self.sizes) else None

    def get(self, rows: int) -> RecordedStep[I, O] | None:
        """The graph for a step of `rows` rows, recorded now if it is due; None: run the step eagerly."""
        size = self.bucket(rows)
        if size is None:
            return None
        found = self._steps.get(size)
        if found is None:
            self._wanted[size] += 1
            if self._wanted[size] >= self._patience:
                found = self._record(size)
        return found

    def idle(self) -> bool:
        """Record the bucket that is most likely wanted next. False when there is nothing (more) to record."""
        left = self._left()
        if not left:
            return False
        # Those that steps have asked for come first, then small ones: most servers are lightly loaded most of the time.
        size = min(left, key=lambda size: (-self._wanted[size], size))
        return self._record(size) is not None

    def record_all(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Record every bucket now, largest first, so that smaller ones fit into its buffers."""
        todo = sorted(self._left(), reverse=True)
        for done, size in enumerate(todo, 1):
            if self.refused is None:
                self._record(size)
            if progress is not None:
                progress(done, len(todo))

    def drop(self) -> None:
        """Forget all graphs, for example because weights moved in memory; what was wanted stays known."""
        self._steps.clear()
        self.refused = None

    @property
    def nbytes(self) -> int:
        # A copy: another thread may ask while this one records.
        return sum(step.graph.bytes for step in list(self._steps.values()))

    def describe(self) -> str:
        """How many graphs there are and what they take, for people."""
        text = f"{len(self._steps)} of {len(self.sizes)} step graphs recorded, {self.nbytes / 2**20:.1f} MiB"
        return f"{text}; no more: {self.refused}" if self.refused else text

    def _left(self) -> list[int]:
        return [] if self.refused else [size for size in self.sizes if size not in self._steps]

    def _record(self, size: int) -> RecordedStep[I, O] | None:
        if self.refused is not None:
            return None
        if self._budget is not None and self.nbytes >= self._budget:
            return self._refuse(f"their memory budget of {self._budget / 2**20:.0f} MiB is used up")
        try:
            inputs, graph, outputs = self._make(size)
        except RecordError as error:
            return self._refuse(str(error))
        except Exception as error:
            # The eager path needs less at a time and may still serve.
            if not is_out_of_memory(error):
                raise
            return self._refuse(f"out of memory at {size} {self._unit}")
        step = self._steps[size] = RecordedStep(size, inputs, outputs, graph)
        _log.debug("recorded the step of %d %s (%.1f MiB)", size, self._unit, graph.bytes / 2**20)
        return step

    def _refuse(self, reason: str) -> None:
        self.refused = reason
        _log.warning("step graphs: %s; such steps run eagerly", reason)
