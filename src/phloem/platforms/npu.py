"""Ascend NPUs through torch_npu, by its documented names, which are those of torch.cuda. Never run on one: tests serve
by a stand-in for torch_npu, a device of torch whose memory is the host's."""

from __future__ import annotations

import importlib
import importlib.util
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from phloem.core.config import environment_of
from phloem.core.errors import ConfigError
from phloem.kernels import npu as fused
from phloem.kernels.ops import Ops
from phloem.platforms._facts import StepFacts
from phloem.platforms._measure import peak_of
from phloem.platforms._staging import Stager
from phloem.platforms._streams import Streams
from phloem.platforms.cuda import LEAST_RESERVE, RESERVE_SHARE

if TYPE_CHECKING:
    from collections.abc import Callable

LIBRARY = "torch_npu"
DRIVER = "ASCEND_HOME_PATH"  # of the environment: what CANN's set_env.sh sets
TABLES = ("npu", "reference")


def is_available() -> tuple[bool, str]:
    if importlib.util.find_spec(LIBRARY) is None:
        return False, f"the library {LIBRARY} is not installed"
    # Without CANN importing it fails, and may leave torch half changed.
    if environment_of(DRIVER) is None:
        return False, f"{LIBRARY} is installed, but not CANN: its set_env.sh sets {DRIVER}, which is not set"
    try:
        library: Any = importlib.import_module(LIBRARY)
    except (ImportError, OSError, RuntimeError) as error:
        return False, f"{LIBRARY} cannot be imported: {(str(error).splitlines() or [''])[0]:.200}"
    if not library.npu.is_available():
        return False, "no Ascend NPU with a working driver was found"
    device = library.npu.current_device()
    total = library.npu.get_device_properties(device).total_memory
    return True, f"{library.npu.get_device_name(device)}, {total / 2**30:.0f} GiB, {LIBRARY} {library.__version__}"


class Platform:
    name = "npu"
    default_memory_fraction = 0.9
    default_running_requests = 128
    default_chunk = 4096
    default_mixed_chunk = 1024
    worthwhile_chunk = 512
    quantised_kv_dtype = None
    compiled = None
    facts: ClassVar[StepFacts] = StepFacts()

    def __init__(self, threads: int | None) -> None:
        self.library: Any = importlib.import_module(LIBRARY)
        self.api: Any = self.library.npu
        self.device = torch.device("npu", self.api.current_device())

    def stager(self) -> Stager:
        return Stager(self.device, self.api)

    def memory(self) -> tuple[int, int]:
        """(free, total) bytes. What torch's allocator holds without using it counts as free."""
        free, total = self.api.mem_get_info(self.device)
        unused = self.api.memory_reserved(self.device) - self.api.memory_allocated(self.device)
        return free + unused, total

    def reserve(self) -> int:
        return max(LEAST_RESERVE, self.memory()[1] // RESERVE_SHARE)

    def measure(self, work: Callable[[], None]) -> int:
        return peak_of(self.api, self.device, work)

    def empty_cache(self) -> None:
        self.api.empty_cache()

    def begin_steps(self) -> None:
        """The thread that runs steps is not the one that chose the device, and the current one is a thread's own."""
        self.api.set_device(self.device)

    def table(self, requested: str | None, *, float32: bool = False) -> tuple[Ops, str]:
        del float32  # these ops compute in the type of what they are given
        if requested not in (None, *TABLES):
            raise ConfigError(f"ops {requested!r} is not one of {', '.join(TABLES)}", param="ops")
        if requested == "reference":
            return Ops(), "as asked"
        missing = [name for name in fused.FUSED if name not in fused.found(self.library)]
        why = f"plain torch and the fused ops of {LIBRARY}" + (f" but {', '.join(missing)}" if missing else "")
        # No step graphs: the reference attention reads lengths on the host, which a capture cannot hold.
        return fused.table(self.library), why + (", as asked" if requested else "")

    @cached_property
    def _beside(self) -> Streams:
        return Streams(self.device, cuda=self.api)

    @property
    def streams(self) -> Streams:
        """The streams beside the computing one, made at first use."""
        return self._beside

    def attention_backends(self) -> list[str]:
        return ["reference"]

    def dtype(self, checkpoint: str | None) -> tuple[torch.dtype, str]:
        if checkpoint in ("float32", "float16"):
            return getattr(torch, checkpoint), "the checkpoint's own type"
        if self.api.is_bf16_supported():
            return torch.bfloat16, "this NPU computes in it"
        return torch.float16, "this NPU has no bfloat16 arithmetic"
