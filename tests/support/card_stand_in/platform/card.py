"""A platform `card` for tests: graphics cards that ranks have one each of. Below it is the stand-in for Ascend NPUs, a
device of torch whose memory is the host's, in each process its own; NCCL's class is one that meets by gloo.

`CARDS` says how many there are; which one a process has taken is told by its memory, which differs from card to card.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import torch

from phloem.attention import reference
from phloem.kernels.graph import Cut, RecordError
from phloem.kernels.ops import Ops
from phloem.platforms import npu
from phloem.platforms._facts import StepFacts

torch.distributed.ProcessGroupNCCL = importlib.import_module("nccl_by_gloo").Group  # type: ignore[attr-defined]

RECORDS = os.environ.get(
    "CARDS_RECORD", ""
)  # "": steps run op by op; "all"; or the rank that fails to record, and of what
taken: list[int] = []


class Backend(reference.Backend):
    """Its decode steps may be recorded: a replay here runs them again, and so may look at what is on the host."""

    def __init__(self, *given: Any, **more: Any) -> None:
        super().__init__(*given, **more)
        self.recordable = bool(RECORDS)


reference.Backend = Backend  # type: ignore[misc]


class Graph:
    """A replay runs the step again, from its fixed inputs into the results of the first run."""

    def __init__(self, fn: Callable[[], Any], found: Any) -> None:
        self.bytes, self._fn, self._found = 1000, fn, found

    def replay(self, *sizes: int) -> None:
        for target, value in zip(_flat(self._found), _flat(self._fn()), strict=True):
            target.copy_(value)


def _flat(found: Any) -> list[torch.Tensor]:
    return [found] if isinstance(found, torch.Tensor) else list(found)


class Between:
    """What stands between pieces, run where it stands or left out."""

    def __init__(self, *, runs: bool) -> None:
        self._runs = runs

    def __call__(self, call: Callable[[], None], more: bool = True) -> None:
        if self._runs:
            call()

    def hold(self, x: torch.Tensor) -> torch.Tensor:
        return x


class Recorder:
    """Runs a step once, as a device does to load its kernels, and captures nothing."""

    cuts, resizes = True, False
    made = 0

    def record(self, fn: Callable[[], Any]) -> tuple[Graph, Any]:
        found = fn()
        self._fail()
        return Graph(fn, found), found

    def record_pieces(self, fn: Callable[[Cut], Any]) -> tuple[Graph, Any]:
        found = fn(Between(runs=False))
        self._fail()
        return Graph(lambda: fn(Between(runs=True)), found), found

    def record_sizes(self, fn: Any, sizes: Any) -> Any:
        raise RecordError("as a captured step keeps its sizes")

    def _fail(self) -> None:
        """The rank and the recording that `CARDS_RECORD` names."""
        self.made += 1
        if taken and f"{taken[-1]}:{self.made}" == RECORDS:
            raise RecordError("as it was asked to")


def is_available() -> tuple[bool, str]:
    return True, "a stand-in"


class Platform(npu.Platform):
    name = "card"
    facts: ClassVar[StepFacts] = StepFacts(meets="nccl", exchanges=("deep_ep",), records_idle=RECORDS != "")

    @staticmethod
    def cards() -> int:
        return int(os.environ.get("CARDS", "2"))

    @staticmethod
    def take(card: int) -> torch.device:
        taken.append(card)
        library = importlib.import_module(npu.LIBRARY)
        library.npu.set_device(card)
        return torch.device("npu", library.npu.current_device())

    def memory(self) -> tuple[int, int]:
        free, total = super().memory()
        less = (taken[-1] if taken else 0) << 28
        return free - less, total - less

    def table(self, requested: str | None, *, float32: bool = False) -> tuple[Ops, str]:
        ops, why = super().table(requested, float32=float32)
        return (replace(ops, recorder=Recorder), why) if RECORDS else (ops, why)
