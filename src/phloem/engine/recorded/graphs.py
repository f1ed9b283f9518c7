"""Which steps are recorded, when, and which graph serves a step; the same policy for every kind and device.

A graph holds a step of a fixed size (a bucket), of rows or of tokens; a smaller step is padded to it, unless the graph
is one that runs smaller ones. Where recording is cheap, a bucket is recorded as soon as it has been wanted often enough
(`inline`). On a device the likely ones are recorded before the engine is ready and what steps ask for beside them in
gaps (`gaps`), so that no step waits for a recording. Until then the next larger graph serves, if it is not twice as
large; where there is none, and wherever recording fails, steps run eagerly.
"""

from __future__ import annotations

import bisect
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from phloem.engine.memory import is_out_of_memory
from phloem.engine.recorded.looks import Looks
from phloem.kernels.graph import Interrupted, RecordError, RecordingEnded
from phloem.utils import log

if TYPE_CHECKING:
    from collections.abc import Callable

    from phloem.kernels.graph import StepGraph

_log = log.get("engine.recorded")

I = TypeVar("I")  # noqa: E741 - the step's inputs
O = TypeVar("O")  # noqa: E741 - what the step gives

ATTEMPTS = 2  # a capture that fails once may have met what another thread did
HOPELESS = 3  # sizes that failed, with none recorded, after which no other is tried


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
            because recording may run it. Gives the inputs, the graph and its outputs. Raises `RecordError`, or
            `Interrupted` where it noticed that somebody waits. It must not hold these graphs: nothing else than
            the last reference may keep a graph and its memory.
        patience: a bucket is due when it has been wanted this many times.
        budget: bytes that all graphs together may take; None for no bound.
        sizes: the buckets; default `bucket_sizes(limit)`.
        unit: what a bucket counts.
        inline: record a due bucket within the step that wants it.
        padded: up to this size a step is served by a graph of up to twice its bucket, while that has none; not where
            buckets are recorded `inline`.
        looks: when a recording is left; default: never.
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
        inline: bool = True,
        padded: int = 0,
        looks: Looks | None = None,
    ) -> None:
        self.looks = Looks() if looks is None else looks
        self.sizes = sizes if sizes is not None else bucket_sizes(limit)
        self.refused: str | None = None  # why nothing more is recorded
        self.given_up: dict[int, str] = {}  # sizes that could not be recorded, and why
        self.announce: Callable[[int], None] | None = None  # called before each attempt to record a size
        self.longest = 0.0  # seconds that a recording took at most
        self.seconds = 0.0  # that all of them took
        self._make = make
        self._patience = patience
        self._budget = budget
        self._unit = unit
        self._inline = inline
        self._padded = 0 if inline else padded
        self._steps: dict[int, RecordedStep[I, O]] = {}
        self._wanted: Counter[int] = Counter()

    def bucket(self, rows: int) -> int | None:
        """The least bucket that holds `rows`, or None where there is none."""
        place = bisect.bisect_left(self.sizes, rows)
        return self.sizes[place] if rows > 0 and place < len(self.sizes) else None

    def get(self, rows: int) -> RecordedStep[I, O] | None:
        """The graph for a step of `rows` rows, or a larger one, recorded now if it is due and that is asked for; None:
        run the step eagerly."""
        size = self.bucket(rows)
        if size is None:
            return None
        found = self._steps.get(size)
        if found is None:
            self._wanted[size] += 1
            if self._inline and self._wanted[size] >= self._patience and size not in self.given_up:
                found = self._record(size)
            elif size <= self._padded:
                found = self._larger(size)
        return found

    def _larger(self, size: int) -> RecordedStep[I, O] | None:
        """The least graph above this size, up to twice as large."""
        first = bisect.bisect_right(self.sizes, size)
        near = self.sizes[first : bisect.bisect_right(self.sizes, 2 * size)]
        return next((self._steps[other] for other in near if other in self._steps), None)

    def of(self, size: int) -> RecordedStep[I, O]:
        """The graph of a bucket that is recorded, as another rank knows. Raises KeyError."""
        return self._steps[size]

    def once(self, size: int) -> None:
        """One attempt to record it, as another rank asks for."""
        begun = self.looks.clock()
        try:
            made = self._make(size)
        except Exception as error:
            if not (isinstance(error, RecordError) or is_out_of_memory(error)):
                raise
            return
        self._keep(size, made, self.looks.clock() - begun)

    def due(self) -> bool:
        """Whether a bucket without a graph has been wanted often enough."""
        return any(self._wanted[size] >= self._patience for size in self._left())

    def idle(self) -> bool:
        """Record the bucket that is most likely wanted next, of those that steps have asked for or probably will.
        False when there is nothing (more) to record."""
        left = [size for size in self._left() if self._wanted[size] or self._likely(size)]
        if not left:
            return False
        # Those that steps have asked for come first, then small ones: most servers are lightly loaded most of the time.
        self._record(min(left, key=lambda size: (-self._wanted[size], size)))
        return True

    def record_all(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Record every bucket now, largest first, so that smaller ones fit into its buffers."""
        todo = sorted(self._left(), reverse=True)
        for done, size in enumerate(todo, 1):
            if self.refused is None:
                self._record(size)
            if progress is not None:
                progress(done, len(todo))

    def record_likely(self, until: float) -> None:
        """Record until the clock of `looks` is `until`: first powers of two and the largest size, then all; from large
        to small, so that smaller ones fit into the buffers of larger ones."""
        for likely in (True, False):
            for size in sorted(self._left(), reverse=True):
                if likely and not self._likely(size):
                    continue
                late = self.looks.clock() + (self.looks.seconds or 0.0) > until
                # One is recorded in any case: nothing else tells how long a gap has to be.
                if self.refused is not None or (late and self.looks.seconds is not None):
                    return
                self._record(size)

    def _likely(self, size: int) -> bool:
        return size & (size - 1) == 0 or size == self.sizes[-1]

    def drop(self) -> None:
        """Forget all graphs, for example because weights moved in memory; what was wanted stays known."""
        self._steps.clear()
        self.given_up.clear()
        self.refused = None

    @property
    def nbytes(self) -> int:
        # A copy: another thread may ask while this one records.
        return sum(step.graph.bytes for step in list(self._steps.values()))

    def refusal(self, size: int) -> str | None:
        """Why a step of this size has no graph and gets none."""
        return self.given_up.get(self.bucket(size) or 0, self.refused)

    def describe(self) -> str:
        """How many graphs there are and what they take, for people."""
        text = f"{len(self._steps)} of {len(self.sizes)} step graphs recorded, {self.nbytes / 2**20:.1f} MiB"
        if self.given_up:
            reasons = "; ".join(sorted(set(self.given_up.values())))
            text += f"; not {', '.join(map(str, sorted(self.given_up)))} {self._unit}: {reasons}"
        return f"{text}; no more: {self.refused}" if self.refused else text

    def facts(self) -> dict[str, Any]:
        """For `/server_info`."""
        return {
            "recorded": len(self._steps),
            "sizes": len(self.sizes),
            "bytes": self.nbytes,
            "seconds": round(self.seconds, 3),
            "longest_seconds": round(self.longest, 3),
            "longest_unseen_seconds": None if self.looks.stretch is None else round(self.looks.stretch, 3),
            "given_up": {str(size): reason for size, reason in list(self.given_up.items())},
            "refused": self.refused,
        }

    def _left(self) -> list[int]:
        if self.refused:
            return []
        return [size for size in self.sizes if size not in self._steps and size not in self.given_up]

    def _record(self, size: int) -> RecordedStep[I, O] | None:
        if self.refused is not None:
            return None
        if self._budget is not None and self.nbytes >= self._budget:
            self.refused = f"their memory budget of {self._budget / 2**20:.0f} MiB is used up"
            _log.warning("step graphs: %s; such steps run eagerly", self.refused)
            return None
        begun, reason = self.looks.clock(), ""
        for _ in range(ATTEMPTS):
            try:
                if self.announce is not None:
                    self.announce(size)
                with self.looks.recording():
                    made = self._make(size)
            except Interrupted:
                return None
            except RecordingEnded as error:
                self.refused = str(error)
                return None
            except RecordError as error:
                reason = str(error)
            except Exception as error:
                # The eager path needs less at a time and may still serve.
                if not is_out_of_memory(error):
                    raise
                reason = f"out of memory at {size} {self._unit}"
            else:
                return self._keep(size, made, self.looks.clock() - begun)
        self._give_up(size, reason)
        return None

    def _keep(self, size: int, made: tuple[I, StepGraph, O], seconds: float) -> RecordedStep[I, O]:
        inputs, graph, outputs = made
        step = self._steps[size] = RecordedStep(size, inputs, outputs, graph)
        self.seconds += seconds
        self.longest = max(self.longest, seconds)
        _log.debug(
            "recorded the step of %d %s (%.1f MiB, %.0f ms)", size, self._unit, graph.bytes / 2**20, seconds * 1e3
        )
        return step

    def _give_up(self, size: int, reason: str) -> None:
        self.given_up[size] = reason
        _log.warning("step graph of %d %s: %s; such steps run eagerly", size, self._unit, reason)
        if not self._steps and len(self.given_up) >= min(HOPELESS, len(self.sizes)):
            self.refused = f"{len(self.given_up)} sizes failed and none was recorded: {reason}"
            _log.warning("step graphs: %s; no other is tried", self.refused)
