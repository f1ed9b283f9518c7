"""Step graphs: one face over a recorded list of native calls and over a captured device graph.

While `record` runs its function once, every op of the table is kept with its arguments, over buffers that stay where
they are. `replay` runs them again: what the step reads that changes (ids, positions, lengths, pages) the caller copies
into the same input tensors first, and the results are in the tensors that `record` returned.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")


class RecordError(RuntimeError):
    """The step does something that a recording cannot see; the text names it. The step must then run eagerly."""


class StepGraph(Protocol):
    """A recorded step."""

    bytes: int  # memory that the graph's own buffers take

    def replay(self) -> None: ...


class GraphRecorder(Protocol):
    """Makes step graphs. One recording at a time in a thread."""

    def record(self, fn: Callable[[], T]) -> tuple[StepGraph, T]:
        """Run `fn` once, recorded, and give the graph with what `fn` returned. Raises `RecordError`."""
        ...
