"""Step graphs on the CPU: native calls recorded once over buffers that stay, replayed by C++ in one parallel region."""

from __future__ import annotations

import bisect
import math
import threading
import weakref
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from phloem.kernels.graph import RecordError
from phloem.utils import memory

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from phloem.kernels._native_runtime import Runtime
    from phloem.kernels.graph import Cut

T = TypeVar("T")
ALIGN = 64
SLAB = 64 << 20  # bytes of address space that are taken at a time


class Space:
    """Memory for the buffers of all recordings of one recorder: they lie over one another.

    That is safe because steps run one after another, and what one gives is used up before the next one runs.
    """

    def __init__(self) -> None:
        self.slabs: list[memory.Bytes] = []
        self.used: list[int] = []  # of each slab, by the recording that needs most

    def add(self, size: int) -> None:
        """One more slab, of `size` bytes at least. What no step writes to is never resident."""
        self.slabs.append(memory.zeros(max(SLAB, size)))
        self.used.append(0)


class Arena:
    """Output buffers of one recording. A buffer whose last tensor dies while recording serves later ops again.

    That is safe because a replay runs the same calls in the same order: nothing reads the buffer in between.
    """

    def __init__(self, space: Space) -> None:
        self.bytes = 0  # that this recording needs beyond those before it
        self.thread = threading.get_ident()  # other threads' ops meanwhile run as ever
        self._space = space
        self._gaps = [[(0, slab.nbytes)] for slab in space.slabs]  # of each slab what is free: (from, to), in order

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        with _disable_current_modes():
            size = math.prod(shape) * dtype.itemsize
            whole = max(ALIGN, -(-size // ALIGN) * ALIGN)
            slab, start = self._take(whole)
            # torch keeps this view alive as long as any tensor shares its storage; then the memory is free again.
            view = self._space.slabs[slab][start : start + size]
            weakref.finalize(view, self._give, slab, start, start + whole).atexit = False
            return torch.from_numpy(view).view(dtype).view(tuple(shape))

    def _take(self, size: int) -> tuple[int, int]:
        """(slab, offset) of the first gap that is large enough."""
        for slab, gaps in enumerate(self._gaps):
            for place, (start, end) in enumerate(gaps):
                if end - start >= size:
                    gaps[place : place + 1] = [(start + size, end)] if end - start > size else []
                    self._note(slab, start + size)
                    return slab, start
        self._space.add(size)
        slab = len(self._gaps)
        self._gaps.append([(0, self._space.slabs[slab].nbytes)])
        return self._take(size)

    def _note(self, slab: int, end: int) -> None:
        more = end - self._space.used[slab]
        if more > 0:
            self._space.used[slab] = end
            self.bytes += more

    def _give(self, slab: int, start: int, end: int) -> None:
        gaps = self._gaps[slab]
        place = bisect.bisect(gaps, (start, end))
        if place < len(gaps) and gaps[place][0] == end:
            end = gaps.pop(place)[1]
        if place and gaps[place - 1][1] == start:
            place -= 1
            start = gaps.pop(place)[0]
        gaps.insert(place, (start, end))


class _OnlyNative(TorchDispatchMode):
    """Lets views through and refuses every torch op that computes: a replay would not repeat it."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Nothing here is ever compiled; torch's guard against that imports its compiler at the first op, for a second.
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.is_view or func is torch.ops.aten.detach.default:
            out = func(*args, **(kwargs or {}))
            # In inference mode a conversion counts as a view of its input.
            if not isinstance(out, torch.Tensor) or out.untyped_storage()._cdata == args[0].untyped_storage()._cdata:
                return out
        raise RecordError(f"the step calls torch's {func}, which a recording of native ops cannot repeat")


class RecordedStep:
    """A recorded step: its calls, and the buffers that they write."""

    def __init__(self, rt: Runtime, graph: Any, arena: Arena) -> None:
        self._replay = rt.library.replay
        self._timed = rt.library.replay_timed
        self._calls = rt.library.calls
        self.graph = graph
        self._arena = arena
        self.bytes = arena.bytes

    def replay(self, *sizes: int) -> None:
        self._replay(self.graph)

    def replay_timed(self) -> list[tuple[str, bool, int]]:
        """Replay and give (op, ran on one thread, nanoseconds) of each call, in order."""
        return self._timed(self.graph)

    def calls(self) -> list[tuple[str, str, bytes]]:
        """(op, signature, arguments of 8 bytes each) of each call, in order."""
        return self._calls(self.graph)


class FlexibleStep:
    """A recorded step of given largest sizes that replays smaller ones."""

    def __init__(self, rt: Runtime, step: RecordedStep, places: list[bytes]) -> None:
        self._set = rt.library.set_slots
        self._step = step
        self._places = places
        self.bytes = step.bytes

    def replay(self, *sizes: int) -> None:
        """`sizes`: of this step, each at most what was recorded; none: as last time."""
        self._cut(sizes)
        self._step.replay()

    def replay_timed(self, *sizes: int) -> list[tuple[str, bool, int]]:
        """As `RecordedStep.replay_timed`, of a step of these sizes."""
        self._cut(sizes)
        return self._step.replay_timed()

    def _cut(self, sizes: tuple[int, ...]) -> None:
        for places, size in zip(self._places, sizes, strict=bool(sizes)):
            self._set(self._step.graph, places, size)


def _places(
    calls: list[tuple[str, str, bytes]],
    other: list[tuple[str, str, bytes]],
    sizes: tuple[int, ...],
    smaller: tuple[int, ...],
) -> list[bytes]:
    """For each size the slots, counted over all calls, that hold it: in the one recording and in the other."""
    if [call[:2] for call in calls] != [call[:2] for call in other]:
        raise RecordError("steps of other sizes make other calls")
    kinds = np.frombuffer("".join(signature.replace(" ", "") for _, signature, _ in calls).encode(), np.uint8)
    values, others = (np.frombuffer(b"".join(call[2] for call in which), np.int64) for which in (calls, other))
    found: list[bytes] = []
    for size, less in zip(sizes, smaller, strict=True):
        at = np.flatnonzero((kinds == ord("i")) & (values == size) & (others == less))
        if not len(at):
            raise RecordError(f"no call of the step has the size {size}")
        found.append(at.astype(np.int32).tobytes())
    return found


class Recorder:
    """`GraphRecorder` of the native table. Its steps share their buffers: see `Space`."""

    cuts, resizes = False, True

    def __init__(self, rt: Runtime) -> None:
        self._rt = rt
        self._space = Space()

    def record(self, fn: Callable[[], T]) -> tuple[RecordedStep, T]:
        """Run `fn` once and keep its native calls.

        Tensors that `fn` reads and the ops do not make must be the caller's and stay in place. Raises `RecordError`
        when `fn` calls a torch op that computes.
        """
        return self._record(fn, run=True)

    def record_pieces(self, fn: Callable[[Cut], T]) -> tuple[RecordedStep, T]:
        raise RecordError("native steps are recorded whole")

    def record_sizes(self, fn: Callable[[tuple[int, ...]], T], sizes: tuple[int, ...]) -> tuple[FlexibleStep, T]:
        """Record a step whose sizes (of tokens, of rows) may be smaller in a replay.

        `fn(sizes)` computes a step of such sizes over buffers for the largest. It is called twice, with `sizes` and
        with smaller ones, and nothing is computed: an integer argument that is the size each time is taken for it.
        Everything else stays as it is for the largest, which serves smaller steps too, since a native op's result does
        not depend on how its work was planned.

        Raises:
            RecordError: as `record`; or the two recordings differ in their calls.
        """
        smaller = tuple(size - 1 - place for place, size in enumerate(sizes))
        if min(smaller) < 1 or len({*sizes, *smaller}) < 2 * len(sizes):
            raise ValueError(f"sizes {sizes} are too small or too close to be told apart")
        step, result = self._record(lambda: fn(sizes), run=False)
        other, _ = self._record(lambda: fn(smaller), run=False)
        return FlexibleStep(self._rt, step, _places(step.calls(), other.calls(), sizes, smaller)), result

    def _record(self, fn: Callable[[], T], run: bool) -> tuple[RecordedStep, T]:
        rt, arena = self._rt, Arena(self._space)
        if rt.arena is not None:
            raise RecordError("a step is already being recorded")
        rt.library.record_begin(run)
        rt.arena = arena
        try:
            with torch.no_grad(), _OnlyNative():
                result = fn()
        except BaseException:
            rt.library.record_end()
            raise
        finally:
            rt.arena = None
        return RecordedStep(rt, rt.library.record_end(), arena), result
