"""What the sections of scripts/gpu_check.py ask of a card beside running kernels; a dry run has something in its place.

Nothing else asks whether there is a card: a dry run goes through the same lines as a run on one, with events that read
the host's clock, memory of a card that is pretended, and a trace in which the host's operators stand for kernels.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from phloem.kernels.graph_cuda import Recorder


class Card:
    """The card that `torch.cuda` has chosen."""

    pretended = False

    def __init__(self) -> None:
        self.device = torch.device("cuda")

    def event(self) -> Any:
        return torch.cuda.Event(enable_timing=True)

    def wait(self) -> None:
        torch.cuda.synchronize()

    def free(self) -> int:
        return torch.cuda.mem_get_info()[0]

    def total(self) -> int:
        return torch.cuda.mem_get_info()[1]

    def allocated(self) -> int:
        return torch.cuda.memory_allocated()

    def empty(self) -> None:
        torch.cuda.empty_cache()

    def count(self) -> int:
        return torch.cuda.device_count()

    def name(self) -> str:
        return torch.cuda.get_device_properties(0).name

    def recorder(self) -> Any:
        return Recorder(self.device)

    def streams(self) -> Any:
        from phloem.platforms._streams import Streams

        return Streams(self.device)

    def trace(self, work: Callable[[], object]) -> dict[str, Any]:
        from phloem.bench._trace import traced

        return traced(work)


class _Event:
    def record(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, later: _Event) -> float:
        return 1e3 * (later.at - self.at)


class Pretended(Card):
    """A card of so much memory, whose work the host does."""

    pretended = True

    def __init__(self, gib: float = 141.0) -> None:
        self.device = torch.device("cpu")
        self._bytes = int(gib * 2**30)

    def event(self) -> Any:
        return _Event()

    def wait(self) -> None:
        pass

    def free(self) -> int:
        return self._bytes

    def total(self) -> int:
        return self._bytes

    def allocated(self) -> int:
        return 0

    def empty(self) -> None:
        pass

    def count(self) -> int:
        return 1

    def name(self) -> str:
        return f"pretended card of {self._bytes / 2**30:.0f} GiB"

    def recorder(self) -> Any:
        from gpu_models import Again

        return Again()

    def streams(self) -> Any:
        return None

    def trace(self, work: Callable[[], object]) -> dict[str, Any]:
        found = super().trace(work)
        for event in found.get("traceEvents", []):
            if event.get("cat") == "cpu_op":
                event["cat"] = "kernel"
        return found


_chosen: list[Card] = [Pretended()]


def use(card: Card) -> Card:
    """Make this the card of the process."""
    _chosen[0] = card
    return card


def here() -> Card:
    """The card of the process."""
    return _chosen[0]


def timed(run: Callable[[], Any], least: int, seconds: float) -> list[float]:
    """Seconds of single runs, between events of the card: `least` runs (2 in short ones), or `seconds`."""
    card = here()
    run()
    card.wait()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < (least if seconds > 0.1 else 2) or time.perf_counter() < end:
        begin, after = card.event(), card.event()
        begin.record()
        run()
        after.record()
        after.synchronize()
        times.append(begin.elapsed_time(after) / 1e3)
    return times
