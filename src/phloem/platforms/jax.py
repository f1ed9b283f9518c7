"""JAX on this machine's processors: what runs on a TPU, slowly and rightly, without one."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from phloem.core.errors import ConfigError
from phloem.platforms._facts import StepFacts
from phloem.utils import machine
from phloem.utils.cores import available_cores

if TYPE_CHECKING:
    from collections.abc import Callable

    from phloem.kernels.ops import Ops

LIBRARY = "jax"


def missing(extra: str) -> str | None:
    """Why jax cannot be imported, with what installs it; None: it can be."""
    if importlib.util.find_spec(LIBRARY) is None:
        return f"the library jax is not installed: pip install 'phloem[{extra}]'"
    return None


def is_available() -> tuple[bool, str]:
    why = missing("jax")
    if why is not None:
        return False, why
    return True, f"jax {importlib.metadata.version(LIBRARY)} on {machine.cpu_name()}"


class Platform:
    """The engine's own tensors lie in the host's memory; weights and caches are jax's."""

    name = "jax"
    backend = "cpu"  # as jax calls it
    device = torch.device("cpu")
    default_memory_fraction = 0.25
    default_running_requests = 16
    default_chunk = 256
    default_mixed_chunk = 128
    worthwhile_chunk = 64
    quantised_kv_dtype = None
    streams = None
    compiled = None
    # What a step gives is in the host's memory when it ends, and tokens are chosen there.
    facts: ClassVar[StepFacts] = StepFacts(on_host=True, masks_ahead=False, compiles=True)

    def __init__(self, threads: int | None) -> None:
        self.threads = threads or available_cores()
        torch.set_num_threads(self.threads)
        self.jax: Any = importlib.import_module(LIBRARY)
        self.jax.config.update("jax_platforms", self.backend)

    def stager(self) -> None:
        """Nothing: a weight is read on the host, and given to jax."""

    def memory(self) -> tuple[int, int]:
        return machine.memory()

    def reserve(self) -> int:
        return 0

    def measure(self, work: Callable[[], None]) -> None:
        """Nothing: steps are compiled one by one, and what the largest takes shows when it is."""

    def empty_cache(self) -> None:
        """Nothing that jax would give back."""

    def begin_steps(self) -> None:
        """Nothing: jax has threads of its own."""

    def table(self, requested: str | None, *, float32: bool = False) -> tuple[Ops, str]:
        del float32  # products of float32 are float32
        if requested not in (None, LIBRARY):
            raise ConfigError(f"ops {requested!r} is not {LIBRARY}, the one table of device {self.name}", param="ops")
        made: Any = importlib.import_module("phloem.kernels.jax.table")
        why = "as asked" if requested else f"steps are compiled by jax for its backend {self.backend!r}"
        return made.table(self.backend), why

    def attention_backends(self) -> list[str]:
        # On a TPU the kernel first; here jax would interpret it, for tests.
        return ["pallas", "reference"] if self.backend == "tpu" else ["reference", "pallas"]

    def dtype(self, checkpoint: str | None) -> tuple[torch.dtype, str]:
        del checkpoint
        return torch.float32, "jax computes narrower types through it on processors"
