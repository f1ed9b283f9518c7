"""A platform `card` for tests: graphics cards that ranks have one each of. Below it is the stand-in for Ascend NPUs, a
device of torch whose memory is the host's, in each process its own; NCCL's class is one that meets by gloo.

`CARDS` says how many there are; which one a process has taken is told by its memory, which differs from card to card.
"""

from __future__ import annotations

import importlib
import os
from typing import ClassVar

import torch

from phloem.platforms import npu
from phloem.platforms._facts import StepFacts

torch.distributed.ProcessGroupNCCL = importlib.import_module("nccl_by_gloo").Group  # type: ignore[attr-defined]

taken: list[int] = []


def is_available() -> tuple[bool, str]:
    return True, "a stand-in"


class Platform(npu.Platform):
    name = "card"
    facts: ClassVar[StepFacts] = StepFacts(meets="nccl", exchanges=("deep_ep",))

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
