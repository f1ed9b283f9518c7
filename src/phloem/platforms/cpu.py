"""x86 and other processors: the native table where it is built, plain torch everywhere."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, ClassVar

import torch

from phloem.core.config import cpu_level
from phloem.core.errors import ConfigError
from phloem.core.resolve import Decision
from phloem.kernels.ops import Ops
from phloem.platforms._facts import StepFacts
from phloem.utils import machine
from phloem.utils.cores import available_cores, bind_threads

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

    from phloem.core.config import CpuLevel

_TABLES = ("reference", "native", "invariant")
_PARALLEL = 1 << 16  # elements per thread with which torch surely uses all its threads


def is_available() -> tuple[bool, str]:
    return True, f"{machine.cpu_name()}, {available_cores()} cores"


class Platform:
    name = "cpu"
    device = torch.device("cpu")
    # The memory is shared with everything else that runs here, and other than on a GPU nobody expects it to be full.
    default_memory_fraction = 0.25
    default_running_requests = 64
    default_chunk = 1024
    default_mixed_chunk = 256
    worthwhile_chunk = 32
    quantised_kv_dtype = torch.int8  # of the KV cache beside quantised weights
    streams = None
    compiled = None
    # An eager step takes 1 or 2 ms longer than a replay, recording takes 35: a bucket that a batch passes through as it
    # empties is not worth it. In idle times recording would take the cores of whatever else runs here.
    facts: ClassVar[StepFacts] = StepFacts(on_host=True, masks_ahead=False, patience=12)

    def __init__(self, threads: int | None) -> None:
        self.threads = threads or available_cores()
        torch.set_num_threads(self.threads)

    def stager(self) -> None:
        """Nothing: weights are read where they are used."""

    def memory(self) -> tuple[int, int]:
        return machine.memory()

    def reserve(self) -> int:
        return 0

    def measure(self, work: Callable[[], None]) -> None:
        """Nothing: other programs share this memory, and take and give back while we look."""

    def empty_cache(self) -> None:
        """Nothing: the system's allocator keeps little, and gives out again what it keeps."""

    def begin_steps(self) -> None:
        """Give each thread of the native pool a core of its own, this one included.

        Where one waits for the other at a barrier, the system likes to wake both on one core, and there they stay.
        """
        native = _native_module()
        workers = native.worker_ids() if native is not None else []
        if workers:
            # Torch's own threads inherit this thread's cores when they begin: before these are narrowed.
            torch.zeros(_PARALLEL * self.threads).neg_()
            bind_threads([0, *workers])

    def table(self, requested: str | None, *, float32: bool = False) -> tuple[Ops, str]:
        if requested not in (None, *_TABLES):
            raise ConfigError(f"ops {requested!r} is not one of {', '.join(_TABLES)}", param="ops")
        if requested == "reference":
            return Ops(), "as asked"
        native = _native_module()
        if native is None:
            reason = "the native kernels are not part of this installation"
        else:
            try:
                if requested == "invariant":
                    ops = native.table(self.threads, invariant=True, float32=float32)
                    return ops, "batch-invariant native kernels, as asked"
                ops = native.table(self.threads, float32=float32)
                return ops, f"native kernels, {'as asked' if requested else native.describe()}"
            except native.Unavailable as error:
                reason = str(error)
        if requested is not None:
            raise ConfigError(f"ops {requested!r} cannot be used: {reason}", param="ops")
        return Ops(), f"plain torch: {reason}"

    def attention_backends(self) -> list[str]:
        return ["cpu", "reference"]

    def dtype(self, checkpoint: str | None) -> tuple[torch.dtype, str]:
        if checkpoint == "float32":
            return torch.float32, "the checkpoint's own type"
        fast = machine.cpu_flags() & {"avx512_bf16", "amx_bf16"}
        forced = _forced_level()
        if fast and forced not in (None, "avx512", "amx"):
            return torch.float32, f"as on processors whose best level is {forced}, which has no bfloat16 arithmetic"
        if fast:
            return torch.bfloat16, f"this processor computes in it ({', '.join(sorted(fast))})"
        return torch.float32, "this processor has no bfloat16 arithmetic"


def level(requested: CpuLevel) -> list[Decision]:
    """The instruction set of the native kernels, as asked, else the best; nothing where there are no such kernels.

    Raises:
        ConfigError: where this processor cannot run what is asked for, or there are no kernels to run it.
    """
    asked, why = cpu_level(requested)
    native = _native_module()
    if native is None:
        return []
    try:
        levels = native.use_level(None if asked == "auto" else asked)
    except native.Unavailable as error:
        if asked == "auto":
            return []
        raise ConfigError(f"cpu_level {asked!r} cannot be used: {error}", param="cpu_level") from error
    if asked == "auto":
        return [Decision("cpu_level", levels[-1], "the best that this processor runs")]
    others = [name for name in levels if name != asked]
    return [Decision("cpu_level", asked, f"{why}; this processor also runs {', '.join(others) or 'no other'}")]


def _forced_level() -> str | None:
    native = _native_module()
    if native is None:
        return None
    try:
        return native.runtime().forced
    except native.Unavailable:
        return None


def _native_module() -> ModuleType | None:
    try:
        return importlib.import_module("phloem.kernels.native")
    except ModuleNotFoundError:
        return None
