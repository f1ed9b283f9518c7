"""Kernels compiled ahead of their first launch: which ones a piece of work would launch, and compiling those.

The work runs on tensors without data (`meta`) while launches are noted instead of done. A note is then compiled by
Triton's own `warmup`, with the note's arguments, for a target that need not be here: the same source, signature and
options as at the launch, so the launch finds the result in Triton's cache on disk. Nothing here needs a device.
"""

# What Triton's stubs do not describe.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
# pyright: reportArgumentType=false

from __future__ import annotations

import contextlib
import multiprocessing
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from phloem.kernels.triton._device import AHEAD

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence


@dataclass(frozen=True, eq=False, slots=True)
class Note:
    """One distinct launch: the kernel and arguments of the class."""

    kernel: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def name(self) -> str:
        return str(self.kernel.fn.__name__)


class Notes:
    """Launches that would be compiled apart, by what tells them apart (`key_of`)."""

    def __init__(self) -> None:
        self.found: dict[tuple[Any, ...], Note] = {}

    def add(self, kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        key = key_of(kernel, args, kwargs)
        if key not in self.found:
            self.found[key] = Note(kernel, args, kwargs)

    @contextlib.contextmanager
    def taken(self) -> Generator[Notes]:
        """In this context launches are noted and not done."""
        before = JITFunction.run

        def note(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
            self.add(kernel, args, kwargs)

        JITFunction.run = note
        try:
            yield self
        finally:
            JITFunction.run = before


def key_of(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """What Triton tells launches of a kernel apart by: types, constants, alignment, and integers that are 1."""
    found: list[Any] = [kernel.fn.__module__, kernel.fn.__name__]
    for number, param in enumerate(kernel.params):
        value = args[number] if number < len(args) else kwargs.get(param.name, param.default)
        found.append(_kind(param, value))
    names = {param.name for param in kernel.params}
    found += sorted((key, value) for key, value in kwargs.items() if key not in names)
    return tuple(found)


def _kind(param: Any, value: Any) -> Any:
    if param.is_constexpr:
        return value
    if isinstance(value, torch.Tensor):
        return value.dtype, value.data_ptr() % 16 == 0
    if isinstance(value, TensorDescriptor):
        return value.base.dtype, tuple(value.block_shape)
    if isinstance(value, bool) or not isinstance(value, int):
        return type(value)
    wide = -(2**31) <= value < 2**31
    if param.do_not_specialize:
        return wide
    return wide, value == 1, value % 16 == 0


class Elsewhere:
    """Stands in for Triton's driver: a device of this kind, of which nothing but the kind is known."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@dataclass(frozen=True, slots=True)
class Compiled:
    """What became of one note."""

    kernel: str
    seconds: float
    cached: bool = False  # it lay in the cache
    error: str | None = None


def aim(backend: str, arch: int | str, warp: int, processors: int, cache: Path) -> None:
    """From now on this process compiles for that kind of device, into `cache`; it launches nothing."""
    AHEAD.processors = processors
    AHEAD.capability = int(arch) if backend == "cuda" else 0
    triton.knobs.cache.dir = str(cache)
    triton.runtime.driver.set_active(Elsewhere(GPUTarget(backend, arch, warp)))


def compile_all(notes: Sequence[Note], processes: int) -> list[Compiled]:
    """Compile every note, in processes of its own: they inherit the notes. Errors are results."""
    if not notes:
        return []
    with multiprocessing.get_context("fork").Pool(
        min(processes, len(notes)), initializer=_INHERITED.extend, initargs=(notes,)
    ) as pool:
        return list(pool.imap_unordered(_compile, range(len(notes)), chunksize=1))


_INHERITED: list[Note] = []


def _compile(number: int) -> Compiled:
    note = _INHERITED[number]
    begun = perf_counter()
    hits: list[bool] = []
    triton.knobs.compilation.listener = lambda *, cache_hit, **_: hits.append(cache_hit)
    try:
        note.kernel.warmup(*note.args, grid=(1,), **note.kwargs)
    except Exception as error:
        return Compiled(note.name, perf_counter() - begun, error=f"{type(error).__name__}: {error}"[:500])
    return Compiled(note.name, perf_counter() - begun, all(hits))
