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
            return func(*args, **(kwargs or {}))
        raise RecordError(f"the step calls torch's {func}, which a recording of native ops cannot repeat")


class RecordedStep:
    """A recorded step: its calls, and the buffers that they write."""

    def __init__(self, rt: Runtime, graph: Any, arena: Arena) -> None:
        self._replay = rt.library.replay
        self._timed = rt.library.replay_timed
        self._graph = graph
        self._arena = arena
        self.bytes = arena.bytes

    def replay(self) -> None:
        self._replay(self._graph)

    def replay_timed(self) -> list[tuple[str, bool, int]]:
        """Replay and give (op, ran on one thread, nanoseconds) of each call, in order."""
        return self._timed(self._graph)


class Recorder:
    """`GraphRecorder` of the native table."""

    def __init__(self, rt: Runtime) -> None:
        self._rt = rt

    def record(self, fn: Callable[[], T]) -> tuple[RecordedStep, T]:
        """Run `fn` once and keep its native calls.

        Tensors that `fn` reads and the ops do not make must be the caller's and stay in place. Raises `RecordError`
        when `fn` calls a torch op that computes.
        """
        rt, arena = self._rt, Arena()
        if rt.arena is not None:
            raise RecordError("a step is already being recorded")
        rt.library.record_begin()
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
