"""What every native op needs: the library, handles of its ops, and output buffers that a recording can own."""

from __future__ import annotations

import functools
import importlib
import threading
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import ModuleType

    from torch import Tensor


class Unavailable(RuntimeError):
    """The native library cannot serve here; the text says why and what to do."""


class Runtime:
    """The loaded library. `call(handle, work, *arguments)` runs an op; see csrc/cpu/README.md."""

    def __init__(self, library: ModuleType) -> None:
        self.library = library
        self.call: Callable[..., None] = library.call
        self.arena: Any = None  # while a step is recorded: where `empty` takes its buffers

    @property
    def recording(self) -> bool:
        """Whether this thread is recording a step."""
        return self.arena is not None and self.arena.thread == threading.get_ident()

    def op(self, name: str) -> int:
        """Handle of the best unit of an op at the current level. KeyError: there is none."""
        return self.library.op(name)

    def has(self, name: str) -> bool:
        try:
            self.library.op(name)
        except KeyError:
            return False
        return True

    def empty(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """An uninitialised contiguous tensor; while a step is recorded, one that its graph keeps."""
        if self.arena is None or not self.recording:
            return torch.empty(shape, dtype=dtype)
        return self.arena.empty(shape, dtype)


@functools.cache
def runtime() -> Runtime:
    """The library, loaded once. Raises `Unavailable`."""
    try:
        library = importlib.import_module("phloem.kernels._cpu")
    except ImportError as error:
        raise Unavailable(
            f"the native CPU kernels are not built ({error}); install a C++ compiler and reinstall phloem"
        ) from error
    return Runtime(library)
