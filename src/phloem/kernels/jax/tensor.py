"""A stand-in for torch's tensors over jax arrays, and what a compiled function reads beside its arguments.

Model files make views of tensors and call ops; `Array` has those views. Whatever else they hand to an op, weights and
tables of rotation, is a *leaf*: inside a function that is being traced an op asks the trace for it, so that weights are
arguments of the compiled function, not constants in it. A leaf is read anew for every call, so it may change.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import torch
from jax.core import Tracer

_Number = float  # the class below has a method of that name

DTYPES: dict[torch.dtype, Any] = {
    torch.float32: jnp.float32,
    torch.bfloat16: jnp.bfloat16,
    torch.float16: jnp.float16,
    torch.int32: jnp.int32,
    torch.int64: jnp.int32,  # ids and positions: nothing here needs more
    torch.bool: jnp.bool_,
}
_TORCH = {np.dtype(kind): torch_kind for torch_kind, kind in DTYPES.items() if torch_kind != torch.int64}


def to_jax(x: torch.Tensor) -> jax.Array:
    """A torch tensor's values on jax's device; on the host they may share memory."""
    return jnp.asarray(to_host(x))


def to_host(x: torch.Tensor) -> np.ndarray[Any, np.dtype[Any]]:
    """A torch tensor's values for jax, still on the host."""
    x = x.detach().contiguous()
    if x.dtype == torch.bfloat16:
        return x.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return x.numpy().astype(DTYPES[x.dtype], copy=False)


def to_torch(x: jax.Array) -> torch.Tensor:
    """A copy in torch's memory, which may be written to."""
    values = np.array(x)
    if values.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(values)


class Array:
    """A tensor as model files and ops see it. What changes it in place puts another array into `a`."""

    __slots__ = ("a",)

    def __init__(self, a: Any) -> None:
        self.a = a

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.a.shape)

    @property
    def ndim(self) -> int:
        return self.a.ndim

    @property
    def dtype(self) -> torch.dtype:
        return _TORCH[np.dtype(self.a.dtype)]

    @property
    def nbytes(self) -> int:
        return int(self.a.nbytes)

    def __len__(self) -> int:
        return self.a.shape[0]

    def __getitem__(self, index: Any) -> Array:
        return Array(lift(self)[lift(index)])

    def __setitem__(self, index: Any, values: Array) -> None:
        self.a = lift(self).at[lift(index)].set(lift(values))

    def view(self, *shape: int) -> Array:
        return Array(lift(self).reshape(shape))

    def unflatten(self, axis: int, sizes: Sequence[int]) -> Array:
        a = lift(self)
        axis %= a.ndim
        return Array(a.reshape(*a.shape[:axis], *sizes, *a.shape[axis + 1 :]))

    def flatten(self, start: int = 0, end: int = -1) -> Array:
        a = lift(self)
        start, end = start % a.ndim, end % a.ndim
        return Array(a.reshape(*a.shape[:start], -1, *a.shape[end + 1 :]))

    def chunk(self, count: int, axis: int = 0) -> list[Array]:
        return [Array(part) for part in jnp.split(lift(self), count, axis)]

    def split(self, sizes: int | Sequence[int], axis: int = 0) -> list[Array]:
        a = lift(self)
        many = [sizes] * (a.shape[axis] // sizes) if isinstance(sizes, int) else sizes
        return [Array(part) for part in jnp.split(a, np.cumsum(many)[:-1], axis)]

    def unsqueeze(self, axis: int) -> Array:
        return Array(jnp.expand_dims(lift(self), axis))

    def squeeze(self, axis: int) -> Array:
        a = lift(self)
        return Array(a.squeeze(axis) if a.shape[axis] == 1 else a)

    def repeat_interleave(self, count: int, axis: int) -> Array:
        return Array(jnp.repeat(lift(self), count, axis))

    def transpose(self, first: int, second: int) -> Array:
        return Array(jnp.swapaxes(lift(self), first, second))

    def masked_fill(self, mask: Array, value: _Number) -> Array:
        return Array(jnp.where(lift(mask) != 0, value, lift(self)))

    def __ge__(self, other: int) -> Array:
        return Array(lift(self) >= other)

    def to(self, kind: torch.dtype) -> Array:
        return Array(lift(self).astype(DTYPES[kind]))

    def float(self) -> Array:
        return self.to(torch.float32)

    def contiguous(self) -> Array:
        return self


Leaf = Array | torch.Tensor


def _key(leaf: Leaf) -> tuple[Any, ...]:
    """Of a tensor its place: every view of it is an object of its own."""
    if isinstance(leaf, Array):
        return (id(leaf),)
    return (leaf.data_ptr(), tuple(leaf.shape), leaf.stride(), leaf.dtype)


class Unknown(LookupError):
    """A trace was asked for a leaf that its function has not been given."""


Copies = dict[tuple[Any, ...], jax.Array]  # of tensors; to be emptied when these have been overwritten


@dataclass
class Leaves:
    """What one function reads beside its arguments, in the order in which it was found. `copies`: all functions'."""

    copies: Copies
    everywhere: Any = None  # where a copy goes: a sharding; None: to the one device
    found: dict[tuple[Any, ...], Leaf] = field(default_factory=dict)

    def values(self) -> list[jax.Array]:
        return [leaf.a if isinstance(leaf, Array) else self._copy(key, leaf) for key, leaf in self.found.items()]

    def _copy(self, key: tuple[Any, ...], leaf: torch.Tensor) -> jax.Array:
        if key not in self.copies:
            copied = jnp.array(to_jax(leaf))
            self.copies[key] = copied if self.everywhere is None else jax.device_put(copied, self.everywhere)
        return self.copies[key]


@dataclass
class _Trace:
    leaves: Leaves
    given: dict[tuple[Any, ...], Any] | None  # None: leaves are being looked for

    def lift(self, leaf: Leaf) -> Any:
        key = _key(leaf)
        if self.given is None:
            self.leaves.found.setdefault(key, leaf)
            return jnp.asarray(leaf.a) if isinstance(leaf, Array) else to_jax(leaf)
        if key not in self.given:
            raise Unknown
        return self.given[key]


_trace: ContextVar[_Trace | None] = ContextVar("phloem_jax_trace", default=None)


@contextmanager
def tracing(leaves: Leaves, values: Sequence[Any] | None = None) -> Generator[None]:
    """Inside, leaves are these values; None: they are found."""
    given = None if values is None else dict(zip(leaves.found, values, strict=True))
    token = _trace.set(_Trace(leaves, given))
    try:
        yield
    finally:
        _trace.reset(token)


def is_tracing() -> bool:
    return _trace.get() is not None


def lift(x: Any) -> Any:
    """The jax array of an `Array` or a tensor, in tuples too; anything else as it is."""
    trace = _trace.get()
    if isinstance(x, Array):
        return x.a if trace is None or isinstance(x.a, Tracer) else trace.lift(x)
    if isinstance(x, torch.Tensor):
        return to_jax(x) if trace is None else trace.lift(x)
    return tuple(lift(part) for part in x) if isinstance(x, tuple) else x


def wrap(x: Any) -> Any:
    """The other way round, in tuples too."""
    if isinstance(x, tuple):
        return tuple(wrap(part) for part in x)
    return Array(x) if isinstance(x, jax.Array) else x
