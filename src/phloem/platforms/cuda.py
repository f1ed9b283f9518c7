"""NVIDIA GPUs: the Triton table where Triton is installed, plain torch otherwise; steps as captured graphs."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from phloem.core.errors import ConfigError
from phloem.kernels.graph_cuda import Recorder
from phloem.kernels.ops import Ops
from phloem.platforms._compiled import Compiled
from phloem.platforms._facts import StepFacts
from phloem.platforms._measure import peak_of
from phloem.platforms._staging import Stager
from phloem.platforms._streams import Streams

if TYPE_CHECKING:
    from collections.abc import Callable

    from phloem.kernels.graph import GraphRecorder

LEAST_RESERVE = 512 * 2**20  # bytes: libraries make workspaces when a shape first asks for them
RESERVE_SHARE = 32  # of the device's memory
TABLES = ("triton", "invariant", "reference")


def is_available() -> tuple[bool, str]:
    if torch.version.hip is not None:
        return False, "this torch is built for ROCm"
    if torch.version.cuda is None:
        return False, f"this torch ({torch.__version__}) is built without CUDA"
    if not torch.cuda.is_available():
        return False, "no NVIDIA GPU with a working driver was found"
    return True, describe_gpu()


def describe_gpu() -> str:
    """Name, memory and architecture of the current GPU."""
    props = torch.cuda.get_device_properties(torch.cuda.current_device())
    return f"{props.name}, {props.total_memory / 2**30:.0f} GiB, compute capability {props.major}.{props.minor}"


def triton_table(requested: str | None) -> tuple[Ops, str]:
    """The table by name, without a recorder, and why this one.

    Raises:
        ConfigError: if the named table is unknown or cannot be used here.
    """
    if requested is not None and requested not in TABLES:
        raise ConfigError(f"ops {requested!r} is not one of {', '.join(TABLES)}", param="ops")
    if requested == "reference":
        return Ops(), "as asked"
    if importlib.util.find_spec("triton") is None:
        if requested is not None:
            raise ConfigError(f"ops {requested!r} cannot be used: Triton is not installed", param="ops")
        return Ops(), "plain torch: Triton is not installed"
    from phloem.kernels.triton import table

    if requested == "invariant":
        return table.invariant_table(), "batch-invariant Triton kernels, as asked"
    return table.table(), "Triton kernels" + (", as asked" if requested else "")


class Platform:
    name = "cuda"
    default_memory_fraction = 0.9
    default_running_requests = 256
    default_chunk = 8192
    default_mixed_chunk = 2048
    worthwhile_chunk = 1024
    quantised_kv_dtype = None
    facts: ClassVar[StepFacts] = StepFacts(records_idle=True, exchanges=("deep_ep",), meets="nccl")

    def __init__(self, threads: int | None) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())

    @staticmethod
    def cards() -> int:
        """As `platforms.Cards`; so is `take`. CUDA_VISIBLE_DEVICES decides which there are, and their order."""
        return torch.cuda.device_count()

    @staticmethod
    def take(card: int) -> torch.device:
        torch.cuda.set_device(card)
        return torch.device("cuda", card)

    def stager(self) -> Stager:
        return Stager(self.device)

    def memory(self) -> tuple[int, int]:
        """(free, total) bytes. What torch's allocator holds without using it counts as free."""
        free, total = torch.cuda.mem_get_info(self.device)
        unused = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return free + unused, total

    def reserve(self) -> int:
        return max(LEAST_RESERVE, self.memory()[1] // RESERVE_SHARE)

    def measure(self, work: Callable[[], None]) -> int:
        return peak_of(torch.cuda, self.device, work)

    def empty_cache(self) -> None:
        torch.cuda.empty_cache()

    def begin_steps(self) -> None:
        """The thread that runs steps is not the one that took the card, and the current one is a thread's own."""
        torch.cuda.set_device(self.device)

    def table(self, requested: str | None, *, float32: bool = False) -> tuple[Ops, str]:
        del float32  # these kernels compute in the type of what they are given
        ops, why = triton_table(requested)
        return replace(ops, recorder=self.recorder), why

    def recorder(self) -> GraphRecorder:
        """Makes step graphs; all that one recorder made share a memory pool."""
        return Recorder(self.device)

    @cached_property
    def _beside(self) -> Streams:
        return Streams(self.device)

    @property
    def streams(self) -> Streams:
        """The streams beside the computing one, made at first use."""
        return self._beside

    @property
    def compiled(self) -> Compiled | None:
        """Triton's kernels for this device; None without Triton."""
        return self._compiling

    @cached_property
    def _compiling(self) -> Compiled | None:
        if importlib.util.find_spec("triton") is None:
            return None
        props = torch.cuda.get_device_properties(self.device)
        return Compiled(self.target(), props.multi_processor_count, f"{props.name} {self.target()}")

    def target(self) -> tuple[str, int | str, int]:
        """The device as Triton names it."""
        major, minor = self._capability()
        return "cuda", 10 * int(major) + int(minor), 32

    def attention_backends(self) -> list[str]:
        return ["triton", "flashinfer", "flash", "reference"]

    def dtype(self, checkpoint: str | None) -> tuple[torch.dtype, str]:
        if checkpoint in ("float32", "float16"):
            return getattr(torch, checkpoint), "the checkpoint's own type"
        major, minor = self._capability()
        if major >= 8:
            return torch.bfloat16, f"compute capability {major}.{minor} computes in it"
        return torch.float16, f"compute capability {major}.{minor} has no bfloat16 arithmetic"

    def _capability(self) -> tuple[Any, Any]:
        return torch.cuda.get_device_capability(self.device)
