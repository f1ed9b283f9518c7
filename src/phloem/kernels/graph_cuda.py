"""Step graphs over captured device graphs (`kernels/graph.py`), NVIDIA's and AMD's alike."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import torch

from phloem.kernels.graph import RecordError

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")


class CapturedGraph:
    """A captured step. `bytes` is what the device's free memory fell by when it was captured."""

    def __init__(self, graph: Any, taken: int) -> None:
        self._graph = graph
        self.bytes = taken

    def replay(self) -> None:
        self._graph.replay()


class Recorder:
    """Captures functions; every graph of one recorder takes its buffers from one memory pool.

    Graphs that share a pool may reuse each other's buffers, so a graph's results hold until the next replay of any.
    `cuda` is torch.cuda, or what stands in for it in a test.
    """

    def __init__(self, device: torch.device, cuda: Any = torch.cuda) -> None:
        self.device = device
        self._cuda = cuda
        self._pool = cuda.graph_pool_handle()
        self._stream = cuda.Stream(device)

    def record(self, fn: Callable[[], T]) -> tuple[CapturedGraph, T]:
        """Run `fn` once (kernels are compiled and workspaces made then), and once more under capture.

        What is captured is not run: the results hold values after the first replay.

        Raises:
            RecordError: if `fn` does what a capture cannot hold, such as waiting for a value.
        """
        cuda = self._cuda
        self._stream.wait_stream(cuda.current_stream(self.device))
        with cuda.stream(self._stream):
            fn()
        cuda.current_stream(self.device).wait_stream(self._stream)
        cuda.synchronize(self.device)
        before = cuda.mem_get_info(self.device)[0]
        graph = cuda.CUDAGraph()
        try:
            # Other threads may use the device meanwhile (a copy's event, say): only this thread's calls are judged.
            with cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                result = fn()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise RecordError(f"the step cannot be captured: {str(error).splitlines()[0]}") from error
        return CapturedGraph(graph, max(0, before - cuda.mem_get_info(self.device)[0])), result
