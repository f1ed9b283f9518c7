"""Step graphs: one face over a recorded list of native calls and over a captured device graph.

While `record` runs its function once, every op of the table is kept with its arguments, over buffers that stay where
they are. `replay` runs them again: what the step reads that changes (ids, positions, lengths, pages) the caller copies
into the same input tensors first, and the results are in the tensors that `record` returned.

A step that cannot be recorded whole is recorded in pieces: between them stand calls that run eagerly in every replay.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

T = TypeVar("T")


class RecordError(RuntimeError):
    """The step does something that a recording cannot see; the text names it. The step must then run eagerly."""


class RecordingEnded(RecordError):
    """Nothing is recorded any more: others who would have to record it too are not there."""


class Interrupted(Exception):
    """A recording was left because a step waits; it may be tried again."""


class StepGraph(Protocol):
    """A recorded step."""

    bytes: int  # memory that the graph's buffers take beyond those that it shares with graphs recorded before it

    def replay(self, *sizes: int) -> None:
        """`sizes`: of this step, each at most what was recorded, where it was recorded by sizes; none: as last time."""
        ...


class Cut(Protocol):
    """Given to a function that is recorded in pieces."""

    def __call__(self, call: Callable[[], None], more: bool = True) -> None:
        """End the piece here. `call` runs at this place in every replay, but not now. `more`: a piece follows."""
        ...

    def hold(self, x: Tensor) -> Tensor:
        """The same memory for use inside a `call`, where `x` itself would keep later pieces from using it again.

        Its values stand between the piece before the call and the piece after it, no longer.
        """
        ...


class GraphRecorder(Protocol):
    """Makes step graphs: whole ones, and one other kind if it says so. One recording at a time in a thread.

    Graphs of one recorder, of whichever kind, may share memory: what a replay gave stands until another of them is
    replayed or recorded.
    """

    cuts: bool  # can record a step in pieces
    resizes: bool  # can record a step whose sizes are set anew for each replay

    def record(self, fn: Callable[[], T]) -> tuple[StepGraph, T]:
        """Run `fn` once, recorded, and give the graph with what `fn` returned. Raises `RecordError`."""
        ...

    def record_pieces(self, fn: Callable[[Cut], T]) -> tuple[StepGraph, T]:
        """As `record`, ending a piece wherever `fn` calls what it is given. Raises `RecordError`."""
        ...

    def record_sizes(self, fn: Callable[[tuple[int, ...]], T], sizes: tuple[int, ...]) -> tuple[StepGraph, T]:
        """Record `fn(sizes)`, a step of the largest sizes, without running it. Raises `RecordError`."""
        ...


class Compiled(Protocol):
    """A function of tensors on the host that is compiled for each of their shapes, at its first call with them."""

    compiled: dict[tuple[Any, ...], float]  # shapes -> seconds

    def __call__(self, arrays: Sequence[Tensor]) -> Tensor:
        """The result, on the host."""
        ...

    def look(self, arrays: Sequence[Tensor]) -> None:
        """Trace it for inputs of these shapes, without compiling. Raises whatever a model does that is not an op."""
        ...


class StepCompiler(Protocol):
    """For a table whose ops are functions of arrays that are not torch's: what keeps memory for them, and compiles
    whole steps. Model files see stand-ins for tensors that have their views."""

    def cache(self, like: Tensor) -> Any:
        """Zeros of a tensor's shape and type, that ops such as `write_kv` change in place."""
        ...

    def function(self, name: str, function: Callable[[list[Any]], Any], caches: Sequence[Any] = ()) -> Compiled:
        """`function` of stand-ins for tensors, by ops and views alone. `caches`: made here, and changed by it."""
        ...


class Pieces:
    """Graphs and eager calls in turn, as one `StepGraph`. `graphs`: how many of the parts are graphs."""

    def __init__(self, parts: list[Callable[[], None]], graphs: int, taken: int) -> None:
        self.parts = parts
        self.graphs = graphs
        self.bytes = taken

    def replay(self, *sizes: int) -> None:
        for part in self.parts:
            part()


def check_replay(graph: StepGraph, recorded: Sequence[Tensor], eager: Callable[[], Sequence[Tensor]]) -> None:
    """Debug mode: replay, run the step eagerly over the same inputs, and compare the results bit for bit.

    Raises `RecordError` naming the first result that differs. KV that the step writes is written twice, alike.
    """
    graph.replay()
    copies = [tensor.clone() for tensor in recorded]
    for number, (got, want) in enumerate(zip(copies, eager(), strict=True)):
        if got.shape != want.shape or not torch.equal(_bits(got), _bits(want)):
            raise RecordError(f"result {number} of the recorded step differs from the eager step's")


def _bits(x: Tensor) -> Tensor:
    """Compared as integers, so that equal NaNs are equal."""
    return x.contiguous().view(torch.uint8)
