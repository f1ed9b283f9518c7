"""Intel GPUs: the Triton table through Intel's Triton; steps run eagerly, as torch captures no graphs there."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch

from phloem.kernels.ops import Ops
from phloem.platforms._facts import StepFacts
from phloem.platforms._measure import peak_of
from phloem.platforms.cuda import LEAST_RESERVE, RESERVE_SHARE, triton_table

if TYPE_CHECKING:
    from collections.abc import Callable


def is_available() -> tuple[bool, str]:
    if not torch.xpu.is_available():
        return False, "no Intel GPU with a working driver was found"
    props = torch.xpu.get_device_properties(torch.xpu.current_device())
    return True, f"{props.name}, {props.total_memory / 2**30:.0f} GiB"


class Platform:
    name = "xpu"
    default_memory_fraction = 0.9
    default_running_requests = 128
    default_chunk = 4096
    default_mixed_chunk = 1024
    worthwhile_chunk = 512
    quantised_kv_dtype = None
    streams = None
    compiled = None
    facts: ClassVar[StepFacts] = StepFacts()

    def __init__(self, threads: int | None) -> None:
        self.device = torch.device("xpu", torch.xpu.current_device())

    def stager(self) -> None:
        """Not written for this kind of device."""

    def memory(self) -> tuple[int, int]:
        free, total = torch.xpu.mem_get_info(self.device)
        return free, total

    def reserve(self) -> int:
        return max(LEAST_RESERVE, self.memory()[1] // RESERVE_SHARE)

    def measure(self, work: Callable[[], None]) -> int:
        return peak_of(torch.xpu, self.device, work)

    def empty_cache(self) -> None:
        torch.xpu.empty_cache()

    def begin_steps(self) -> None:
        """Nothing: this thread hardly computes."""

    def table(self, requested: str | None, *, float32: bool = False) -> tuple[Ops, str]:
        del float32  # these kernels compute in the type of what they are given
        return triton_table(requested)

    def attention_backends(self) -> list[str]:
        return ["triton", "reference"]

    def dtype(self, checkpoint: str | None) -> tuple[torch.dtype, str]:
        if checkpoint in ("float32", "float16"):
            return getattr(torch, checkpoint), "the checkpoint's own type"
        return torch.bfloat16, "Intel's matrix engines compute in it"
