"""Attention backends: the file name is the backend's name.

Each file has `class Backend(ops, specs, device, dtype)` with `name`, `ops`, `page_size` (preferred), `decline(need)`
and `begin(batch, pool)`; `dtype` is that of the KV cache. The first of an ordered list that does not decline is taken.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from phloem.attention._cascade import Sharing
from phloem.core.errors import ConfigError
from phloem.layers.context import StateStep
from phloem.utils.registry import Registry

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from torch import Tensor

    from phloem.kernels.ops import IndexCall, LatentCall, Ops, PagedBatch
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
    ops: Ops
    page_size: int
    recordable: bool  # a step of one token a row waits for nothing on the host, so that a recorded step can hold it

    def decline(self, need: AttentionNeed) -> str | None:
        """Why this backend cannot serve the need, or None."""
        ...

    def begin(self, batch: PagedBatch, pool: KVPool) -> AttentionStep:
        """Plan one step; the result is called once per attention layer."""
        ...


@runtime_checkable
class SharingBackend(Protocol):
    """A backend that attends to pages that rows share once for all of them (`PagedBatch.shared`)."""

    sharing: Sharing | None  # what that costs; None: it does not


def sharing_of(backend: AttentionBackend) -> tuple[Sharing | None, str]:
    """What attending to shared pages once costs on this backend, or None; and why."""
    if isinstance(backend, SharingBackend) and backend.sharing is not None:
        return backend.sharing, "pages that rows share are read once a step, where that saves more than it costs"
    return None, f"the attention backend {backend.name!r} reads every row's pages for itself"


class BackendKind(Protocol):
    """What a backend's file has: how a backend is made. `dtype` is that of the KV cache."""

    def __call__(
        self, ops: Ops, specs: Sequence[AttentionSpec], device: torch.device, dtype: torch.dtype
    ) -> AttentionBackend: ...


PLAIN = ("reference",)  # takes everything, so nobody behind it is asked
BACKENDS: Registry[BackendKind] = Registry("phloem.attention", "attention backend", "Backend")


@dataclass(slots=True)
class StateRows:
    """Which states a step's rows read and write, for all layers of the group (`layers.context.StateStep`)."""

    reads: Tensor  # [R] int64
    writes: Tensor  # [R] int64
    fresh: Tensor  # [R] bool
    query_start: Tensor  # [R + 1] int32
    prefix_lens: Tensor  # [R] int32
    max_query_len: int


@dataclass(slots=True)
class Memory:
    """One step's memory (`layers.context.StepMemory`): what was planned for each group of the pool, in its order."""

    pool: KVPool
    steps: Sequence[AttentionStep | StateRows]
    ops: Ops | None = None  # of latent attention
    batches: Sequence[PagedBatch | StateRows] = ()

    def attend_latent(
        self,
        pool: int,
        q_nope: Tensor,
        q_rope: Tensor,
        latent: Tensor,
        call: LatentCall,
        chosen: Tensor | None = None,
    ) -> Tensor:
        scales = self.pool.scales.get(pool)
        if scales is None:
            return self._attend_latent(pool, q_nope, q_rope, latent, call, chosen)
        # Keys and values are linear in what is kept: its scale goes to the logits' factor and to what comes out.
        scale = scales.k_values[0]
        call = replace(call, scale=call.scale * scale)
        return self._attend_latent(pool, q_nope, q_rope, latent / scale, call, chosen) * scale

    def _attend_latent(
        self, pool: int, q_nope: Tensor, q_rope: Tensor, latent: Tensor, call: LatentCall, chosen: Tensor | None
    ) -> Tensor:
        ops, batch, cache = self._latents(pool, latent)
        if chosen is not None:
            return ops.chosen_latent_attention(q_nope, q_rope, cache, batch, call, chosen)
        return ops.latent_attention(q_nope, q_rope, cache, batch, call)

    def choose(self, pool: int, call: IndexCall) -> Tensor | None:
        ops, batch, cache = self._latents(pool, call.keys)
        # Where no text is longer, there is nothing to choose, and the keys alone are kept; but not where all up to its
        # own are attended to by another op: a token's neighbours in the step would change its bits.
        same = ops.latent_attention is ops.chosen_latent_attention
        return None if same and batch.max_seq_len <= call.count else ops.choose_keys(call, cache, batch)

    def _latents(self, pool: int, new: Tensor) -> tuple[Ops, PagedBatch, Tensor]:
        """The table, the step's rows and the pages of a latent pool, the new tokens' vectors written."""
        batch, cache = self.batches[self.pool.group_of[pool]], self.pool.keys[pool]
        assert self.ops is not None, "no op table for latent attention"
        assert not isinstance(batch, StateRows), "a latent layer names a pool of states"
        self.ops.write_latent(new, cache, batch.token_slots)
        return self.ops, batch, cache

    def keep(self, pool: int, x_TN: Tensor, /) -> None:
        batch, keys, values = self._halves(pool)
        assert self.ops is not None, "no op table for what is kept"
        first, second = (half.unsqueeze(1) for half in x_TN.chunk(2, -1))
        self.ops.write_kv(first, second, keys, values, batch.token_slots)

    def kept(self, pool: int, /) -> tuple[Tensor, Tensor]:
        batch, keys, values = self._halves(pool)
        slots_T = batch.token_slots.long()
        return keys.view(-1, keys.shape[-1])[slots_T], values.view(-1, values.shape[-1])[slots_T]

    def _halves(self, pool: int) -> tuple[PagedBatch, Tensor, Tensor]:
        batch = self.batches[self.pool.group_of[pool]]
        assert not isinstance(batch, StateRows), "what is kept of tokens names a pool of states"
        return batch, self.pool.keys[pool], self.pool.values[pool]

    def attend(self, spec: AttentionSpec, heads: Heads) -> Tensor:
        step = self.steps[self.pool.group_of[spec.pool]]
        assert not isinstance(step, StateRows), "an attention layer names a pool of states"
        return step(spec, heads)

    def state(self, pool: int) -> StateStep:
        rows = self.steps[self.pool.group_of[pool]]
        assert isinstance(rows, StateRows), "a recurrent layer names a pool of pages"
        return StateStep(
            self.pool.states[pool],
            rows.reads,
            rows.writes,
            rows.fresh,
            rows.query_start,
            rows.prefix_lens,
            rows.max_query_len,
        )


def begin(backend: AttentionBackend, batches: Sequence[PagedBatch | StateRows], pool: KVPool) -> Memory:
    """Plan one step of a model. `batches`: its rows in each of the pool's groups.

    A page of a window's table that lies wholly behind the window may be 0: no backend lets what is there count.
    """
    steps = [batch if isinstance(batch, StateRows) else backend.begin(batch, pool) for batch in batches]
    return Memory(pool, steps, backend.ops, batches)


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
