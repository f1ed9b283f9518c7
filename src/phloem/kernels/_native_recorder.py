"""Step graphs on the CPU: native calls recorded once over buffers that stay, replayed by C++ in one parallel region."""

from __future__ import annotations

import math
import threading
import weakref
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from phloem.kernels.graph import RecordError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from phloem.kernels._native_runtime import Runtime

T = TypeVar("T")
ALIGN = 64


class Arena:
    """Output buffers of one recording. A buffer whose last tensor dies while recording serves a later op again.

    That is safe because a replay runs the same calls in the same order: nothing reads the buffer in between.
    """

    def __init__(self) -> None:
        self.bytes = 0
        self.thread = threading.get_ident()  # other threads' ops meanwhile run as ever
        self._free: dict[int, list[np.ndarray[Any, Any]]] = {}
        self._blocks: list[np.ndarray[Any, Any]] = []

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        with _disable_current_modes():
            size = math.prod(shape) * dtype.itemsize
            block = self._take(max(ALIGN, -(-size // ALIGN) * ALIGN))
            # torch keeps this view alive as long as any tensor shares its storage; then the block is free again.
            view = block[:size]
            weakref.finalize(view, self._free[block.nbytes].append, block).atexit = False
            return torch.from_numpy(view).view(dtype).view(tuple(shape))

    def _take(self, size: int) -> np.ndarray[Any, Any]:
        free = self._free.setdefault(size, [])
        if free:
            return free.pop()
        whole = np.empty(size + ALIGN, np.uint8)
        start = -whole.ctypes.data % ALIGN
        block = whole[start : start + size]
        self._blocks.append(block)
        self.bytes += size
        return block


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

    def replay(self) -> None:
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
        for places, size in zip(self._places, sizes, strict=bool(sizes)):
            self._set(self._step.graph, places, size)
        self._step.replay()


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
    """`GraphRecorder` of the native table."""

    def __init__(self, rt: Runtime) -> None:
        self._rt = rt

    def record(self, fn: Callable[[], T]) -> tuple[RecordedStep, T]:
        """Run `fn` once and keep its native calls.

        Tensors that `fn` reads and the ops do not make must be the caller's and stay in place. Raises `RecordError`
        when `fn` calls a torch op that computes.
        """
        return self._record(fn, run=True)

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
        rt, arena = self._rt, Arena()
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
