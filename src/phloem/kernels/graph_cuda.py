"""Step graphs over captured device graphs (`kernels/graph.py`), NVIDIA's and AMD's alike."""

from __future__ import annotations

import contextlib
import gc
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from phloem.kernels.graph import Pieces, RecordError

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from torch import Tensor

    from phloem.kernels.graph import Cut

T = TypeVar("T")

# Other threads may use the device during a capture (a copy's event, say): only the capturing thread's calls are judged.
ERROR_MODE = "thread_local"


class CapturedGraph:
    """A captured step. `bytes` is what the device's free memory fell by when it was captured."""

    def __init__(self, graph: Any, taken: int) -> None:
        self._graph = graph
        self.bytes = taken

    def replay(self, *sizes: int) -> None:
        self._graph.replay()


class Recorder:
    """Captures functions; every graph of one recorder takes its buffers from one memory pool.

    Graphs that share a pool may reuse each other's buffers, so a graph's results hold until the next replay of any.
    `cuda` is torch.cuda, or what stands in for it in a test.
    """

    cuts, resizes = True, False

    def __init__(self, device: torch.device, cuda: Any = torch.cuda) -> None:
        self.device = device
        self._cuda = cuda
        self._collected = False
        self._pool = cuda.graph_pool_handle()
        self._stream = cuda.Stream(device)

    def record(self, fn: Callable[[], T]) -> tuple[CapturedGraph, T]:
        """Run `fn` once (kernels are compiled and workspaces made then), and once more under capture.

        What is captured is not run: the results hold values after the first replay.

        Raises:
            RecordError: if `fn` does what a capture cannot hold, such as waiting for a value.
        """
        cuda = self._cuda
        self._warm_up(fn)
        before = cuda.mem_get_info(self.device)[0]
        graph = cuda.CUDAGraph()
        try:
            # `stream` restores the stream: torch's own context does not where the capture ends in an error.
            with (
                self._nothing_dies(),
                cuda.stream(cuda.current_stream(self.device)),
                cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode=ERROR_MODE),
            ):
                result = fn()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise _not_captured(error) from error
        return CapturedGraph(graph, max(0, before - cuda.mem_get_info(self.device)[0])), result

    def record_pieces(self, fn: Callable[[Cut], T]) -> tuple[Pieces, T]:
        """As `record`, in pieces; the eager calls between them are not run here, neither to warm up nor to capture.

        Raises:
            RecordError: as `record`.
        """
        cuda = self._cuda
        self._warm_up(lambda: fn(_NoCut()))
        # Freed once for all pieces, so that the pool finds room.
        cuda.empty_cache()
        before = cuda.mem_get_info(self.device)[0]
        cut = _Capture(cuda, self._pool)
        with self._nothing_dies(), cuda.stream(self._stream):
            try:
                cut.begin()
                result = fn(cut)
                cut.end()
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                raise _not_captured(error) from error
            finally:
                cut.abandon()
        taken = max(0, before - cuda.mem_get_info(self.device)[0])
        return Pieces(cut.parts, cut.graphs, taken), result

    def record_sizes(self, fn: Callable[[tuple[int, ...]], T], sizes: tuple[int, ...]) -> tuple[CapturedGraph, T]:
        raise RecordError("a captured step keeps its sizes")

    @contextlib.contextmanager
    def _nothing_dies(self) -> Generator[None]:
        """Keep Python's collector from running: a graph, stream or event that it frees ends a capture in progress.

        What was garbage before the first capture is freed now, with the memory that it held.
        """
        gc.collect(1 if self._collected else 2)  # all of it takes half a second in a large process
        self._collected = True
        on = gc.isenabled()
        gc.disable()
        try:
            yield
        finally:
            if on:
                gc.enable()

    def _warm_up(self, fn: Callable[[], Any]) -> None:
        cuda = self._cuda
        self._stream.wait_stream(cuda.current_stream(self.device))
        try:
            with cuda.stream(self._stream):
                fn()
        finally:  # also where it is left half done: the next step comes behind it
            cuda.current_stream(self.device).wait_stream(self._stream)
        cuda.synchronize(self.device)


class _NoCut:
    """While warming up: the calls are left out, their results are whatever their buffers hold."""

    def __call__(self, call: Callable[[], None], more: bool = True) -> None: ...

    def hold(self, x: Tensor) -> Tensor:
        return x


class _Capture:
    """Captures one piece after the other into a pool, on the current stream."""

    def __init__(self, cuda: Any, pool: Any) -> None:
        self.parts: list[Callable[[], None]] = []
        self.graphs = 0
        self._cuda = cuda
        self._pool = pool
        self._open: Any = None

    def begin(self) -> None:
        graph = self._cuda.CUDAGraph()
        graph.capture_begin(pool=self._pool, capture_error_mode=ERROR_MODE)
        self._open = graph

    def end(self) -> None:
        graph, self._open = self._open, None
        if graph is not None:
            graph.capture_end()
            self.parts.append(graph.replay)
            self.graphs += 1

    def abandon(self) -> None:
        """After an error: a capture left open would make every later call of this thread part of it."""
        graph, self._open = self._open, None
        if graph is not None:
            with contextlib.suppress(RuntimeError):
                graph.capture_end()

    def __call__(self, call: Callable[[], None], more: bool = True) -> None:
        self.end()
        self.parts.append(call)
        if more:
            self.begin()

    def hold(self, x: Tensor) -> Tensor:
        return alias(x)


def alias(x: Tensor) -> Tensor:
    """A view of x's memory that does not own it: when x dies, the allocator may give the memory out again.

    Of use for memory of a graph's pool alone, which stays reserved as long as the graph lives.
    """
    make = getattr(torch._C, "_construct_storage_from_data_pointer", None)
    if make is None:  # no public function does this; without it each layer's buffers stay apart
        return x
    storage = x.untyped_storage()
    unowned = make(storage.data_ptr(), x.device, storage.nbytes())
    return torch.empty(0, dtype=x.dtype, device=x.device).set_(unowned, x.storage_offset(), x.shape, x.stride())


def _not_captured(error: RuntimeError) -> RecordError:
    return RecordError(f"the step cannot be captured: {str(error).splitlines()[0]}")
