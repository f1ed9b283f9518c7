"""Attention backends: the file name is the backend's name.

Each file has `class Backend(ops, specs, device, dtype)` with `name`, `page_size` (preferred), `decline(need)` and
`begin(batch, pool)`; `dtype` is that of the KV cache. The first of an ordered list that does not decline is taken.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from phloem.core.errors import ConfigError
from phloem.utils.registry import Registry

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from torch import Tensor

    from phloem.kernels.ops import Ops, PagedBatch
    from phloem.kvcache.pool import KVPool
    from phloem.layers.context import AttentionSpec, AttentionStep, Heads


@dataclass(frozen=True)
class AttentionNeed:
    """What a model and the settings ask of a backend."""

    specs: Sequence[AttentionSpec]
    kv_dtype: torch.dtype
    device: torch.device
    page_size: int | None = None  # None: the backend's preference
    kv_scales: int = 0  # numbers in a layer's scale of the KV cache: 1, or one per kv head; 0: no scales

    @property
    def sinks(self) -> bool:
        """Whether any layer has attention sinks."""
        return any(spec.sinks for spec in self.specs)


class AttentionBackend(Protocol):
    name: str
    page_size: int

    def decline(self, need: AttentionNeed) -> str | None:
        """Why this backend cannot serve the need, or None."""
        ...

    def begin(self, batch: PagedBatch, pool: KVPool) -> AttentionStep:
        """Plan one step; the result is called once per attention layer."""
        ...


class BackendKind(Protocol):
    """What a backend's file has: how a backend is made. `dtype` is that of the KV cache."""

    def __call__(
        self, ops: Ops, specs: Sequence[AttentionSpec], device: torch.device, dtype: torch.dtype
    ) -> AttentionBackend: ...


PLAIN = ("reference",)  # takes everything, so nobody behind it is asked
BACKENDS: Registry[BackendKind] = Registry("phloem.attention", "attention backend", "Backend")


@dataclass(slots=True)
class Memory:
    """One step's memory (`layers.context.StepMemory`)."""

    attention: AttentionStep

    def attend(self, spec: AttentionSpec, heads: Heads) -> Tensor:
        return self.attention(spec, heads)


def begin(backend: AttentionBackend, batch: PagedBatch, pool: KVPool) -> Memory:
    """Plan one step of a model."""
    return Memory(backend.begin(batch, pool))


@dataclass(frozen=True)
class Choice:
    """The backend taken, why, and why those before it were not."""

    backend: AttentionBackend
    reason: str
    declined: dict[str, str] = field(default_factory=dict)


def with_others(names: Sequence[str]) -> list[str]:
    """A platform's preference, with the backends that it does not name before its last resort: a new file is asked."""
    others = [name for name in BACKENDS.names() if name not in names and name not in PLAIN]
    return [*names[:-1], *others, *names[-1:]]


def choose(names: Sequence[str], need: AttentionNeed, ops: Ops, *, named: str | None = None) -> Choice:
    """The first of `names` that does not decline; `named`, if given, is taken or refused.

    Raises:
        ConfigError: for an unknown name, when the named backend declines, or when all do; with every reason.
    """
    declined: dict[str, str] = {}
    for name in [named] if named else names:
        backend = BACKENDS.get(name)(ops, need.specs, need.device, need.kv_dtype)
        reason = backend.decline(need)
        if reason is None:
            why = "named in the settings" if named else "the platform's first choice that accepts"
            return Choice(backend, why, declined)
        declined[name] = reason
    told = "; ".join(f"{name}: {reason}" for name, reason in declined.items())
    if named:
        raise ConfigError(f"attention backend {told}", param="attention_backend")
    raise ConfigError(f"no attention backend accepts this model ({told or 'none was offered'})")
