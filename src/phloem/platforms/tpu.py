"""TPUs through JAX. Never run on one: tests lower its steps for a TPU, and compute them by jax on processors."""

from __future__ import annotations

import importlib
import importlib.util

import torch

from phloem.core.config import cache_home
from phloem.platforms import jax as host

LIBRARY = "libtpu"  # the driver and compiler, which jax loads


def is_available() -> tuple[bool, str]:
    why = host.missing("tpu")
    if why is None and importlib.util.find_spec(LIBRARY) is None:
        why = f"jax sees no TPU, as the library {LIBRARY} is not installed: pip install 'phloem[tpu]'"
    if why is not None:
        return False, why
    jax = importlib.import_module(host.LIBRARY)
    try:
        found = jax.devices("tpu")
    except RuntimeError as error:
        return False, f"jax sees no TPU: {str(error).splitlines()[0]:.200}"
    return True, f"{found[0].device_kind}, jax {jax.__version__}"


class Platform(host.Platform):
    name = "tpu"
    backend = "tpu"
    default_memory_fraction = 0.8
    default_running_requests = 64
    default_chunk = 1024
    default_mixed_chunk = 512
    worthwhile_chunk = 256

    def __init__(self, threads: int | None) -> None:
        super().__init__(threads)
        # Of steps that were compiled by an earlier process.
        self.jax.config.update("jax_compilation_cache_dir", str(cache_home() / "jax"))

    def memory(self) -> tuple[int, int]:
        seen = self.jax.devices(self.backend)[0].memory_stats()
        return seen["bytes_limit"] - seen["bytes_in_use"], seen["bytes_limit"]

    def dtype(self, checkpoint: str | None) -> tuple[torch.dtype, str]:
        if checkpoint == "float32":
            return torch.float32, "the checkpoint's own type"
        return torch.bfloat16, "the matrix units compute in it"
