"""What every native op needs: the library, handles of its ops, and output buffers that a recording can own."""

from __future__ import annotations

import functools
import importlib
import threading
import warnings
from typing import TYPE_CHECKING, Any

import torch

from phloem.kernels._native_build import failure, stale

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import ModuleType

    from torch import Tensor


class Unavailable(RuntimeError):
    """The native library cannot serve here; the text says why and what to do."""


class Runtime:
    """The loaded library. `call(handle, work, **arguments)` runs an op; see csrc/cpu/README.md.

    Names are checked against what the library exports at the first call from each place. Raises `Unavailable` for a
    library that exports none; one of other sources than the checkout's serves with a warning.
    """

    def __init__(self, library: ModuleType) -> None:
        try:
            old = stale(library.built_from())
            self.constants = _agreed(library.constants())
        except AttributeError:
            raise Unavailable(
                "the native CPU kernels are of an older build: install again (pip install -e .)"
            ) from None
        if old:
            warnings.warn(f"the native CPU kernels were {old}", stacklevel=2)
        self.library = library
        self.forced: str | None = None  # the level that tables use unless they are given one; None: the best
        self.call: Callable[..., None] = library.call
        self.arena: Any = None  # while a step is recorded: where `empty` takes its buffers

    @property
    def recording(self) -> bool:
        """Whether this thread is recording a step."""
        return self.arena is not None and self.arena.thread == threading.get_ident()

    def op(self, name: str) -> int:
        """Handle of the best unit of an op at the current level. KeyError: there is none."""
        return self.library.op(name)

    def constant(self, name: str) -> int:
        """A number of the kernels, such as "attention.kSplitTokens". KeyError: they have none of this name."""
        return self.constants[name]

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


def _agreed(entries: Sequence[tuple[str, str, int]]) -> dict[str, int]:
    """Constants by name. Raises `Unavailable` where two instruction sets have another value."""
    found: dict[str, int] = {}
    for name, level, value in entries:
        if found.setdefault(name, value) != value:
            raise Unavailable(f"the native CPU kernels disagree on {name}: {found[name]}, and {value} for {level}")
    return found


@functools.cache
def runtime() -> Runtime:
    """The library, loaded once. Raises `Unavailable`."""
    try:
        library = importlib.import_module("phloem.kernels._cpu")
    except ImportError as error:
        why = failure() or str(error)
        raise Unavailable(
            f"the native CPU kernels are not built ({why}); install a C++ compiler and reinstall phloem"
        ) from error
    return Runtime(library)
