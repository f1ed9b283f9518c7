"""What a layer is given beside its sizes, and the one face of attention that models know.

A model's `forward(step)` receives a `ForwardBatch`; its attention layers hand q, k and v to `step.memory`, which
attention backends made for this step. Models never see pages; backends never see models.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Concatenate, Protocol

from phloem.core.memory import MemorySpec, Paged
from phloem.distributed.mesh import Mesh

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from torch import Tensor

    from phloem.distributed.comm import Comm
    from phloem.kernels.ops import IndexCall, LatentCall, Ops, Rotation
    from phloem.layers.aside import Aside
    from phloem.layers.rows import Rows
    from phloem.layers.spread import Spread
    from phloem.quant import Method
    from phloem.quant._source import Stager


@dataclass(frozen=True)
class AttentionSpec:
    """One attention layer's constants. `window` 0 is full attention; `softcap` 0 is none.

    `sinks`: the layer hands one logit per head to attention, which takes part in the softmax and adds nothing.
    `pool`: where its keys and values are kept. Layers number their pools from 0 without gaps; those that read what
    another layer wrote name that layer's pool and do not write.
    """

    pool: int
    heads: int
    kv_heads: int
    head_size: int  # of queries and keys
    scale: float
    window: int = 0
    softcap: float = 0.0
    sinks: bool = False
    value_size: int = 0  # 0: as `head_size`
    writes: bool = True
    causal: bool = True
    chunk: int = 0  # attends only inside its own chunk of this many positions; 0: no chunks
    block: int = 0  # sees to the end of its own block of this many positions (diffusion); 0: up to itself

    @property
    def values(self) -> int:
        """Size of a value head."""
        return self.value_size or self.head_size

    @property
    def plain(self) -> bool:
        """Nothing but grouped heads of one size, causal, with what `window`, `softcap` and `sinks` say."""
        same = self.values == self.head_size
        return same and self.writes and self.causal and not self.chunk and not self.block


def memory_of(specs: Sequence[AttentionSpec]) -> list[MemorySpec]:
    """What attention layers keep, by pool index, for a model that has nothing else to keep.

    Raises:
        ValueError: if the pools of the layers that write are not numbered from 0 without gaps.
    """
    writers = sorted((spec for spec in specs if spec.writes), key=lambda spec: spec.pool)
    if [spec.pool for spec in writers] != list(range(len(writers))):
        raise ValueError(f"pools of attention layers must be numbered 0 to {len(writers) - 1}")
    return [Paged(spec.kv_heads, spec.head_size, spec.values, spec.window) for spec in writers]


@dataclass(frozen=True, slots=True)
class Relative:
    """What attention adds to a logit for how far the query stands behind the key (DeBERTa, He et al., 2021): the query
    with the key of their distance, and the key with the query of it. B rows of distances."""

    rows: Tensor  # [2 M - 1] int64: the row of each distance -(M - 1) to M - 1
    keys: Tensor | None  # [H, B, D]
    queries: Tensor | None  # [H, B, D]


@dataclass(slots=True)
class Heads:
    """What a layer hands to attention. T packed tokens, H query heads, K kv heads, D head size.

    `rotation` None: q and k are ready as they are. Otherwise they are used up: the step may change them in place.
    """

    q: Tensor  # [T, H, D]
    k: Tensor  # [T, K, D]
    v: Tensor  # [T, K, value size]
    sinks: Tensor | None = None  # [H]
    rotation: Rotation | None = None
    # [H, 2 M - 1]: added to the logits of each distance (key behind query), -(M - 1) to M - 1
    distances: Tensor | None = None
    relative: Relative | None = None


class AttentionStep(Protocol):
    """Attention of one step over one group of memory: rotates q and k, writes the new tokens' keys and values, then
    attends over each row's pages; [T, H, value size]."""

    def __call__(self, spec: AttentionSpec, heads: Heads) -> Tensor: ...


@dataclass(slots=True)
class StateStep:
    """States of one recurrent layer, for the R rows of a step. Row r's new tokens are [query_start[r],
    query_start[r + 1]) of the step's T. What is read stays as it is, unless a row reads where it writes."""

    tensors: tuple[Tensor, ...]  # [states, ...] each, as the layer's `core.memory.State` says
    reads: Tensor  # [R] int64: the state before the first new token, but of fresh rows
    writes: Tensor  # [R] int64: where the state behind the last new token goes; 0 is scratch
    fresh: Tensor  # [R] bool: rows that begin from nothing
    query_start: Tensor  # [R + 1] int32
    prefix_lens: Tensor  # [R] int32: tokens that the state to be read has taken in
    max_query_len: int

    def run(self, call: Callable[Concatenate[StateStep, ...], Tensor], *of_T: Tensor) -> Tensor:
        """As `States`."""
        return call(self, *of_T)


class States(Protocol):
    """States of one recurrent layer in a step that may be being recorded."""

    def run(self, call: Callable[Concatenate[StateStep, ...], Tensor], *of_T: Tensor) -> Tensor:
        """What `call` makes of the step's states and of these, [T, ...] each; in shape and type like the first of them.

        What depends on which tokens are of which row is to be called so: between recorded pieces it runs eagerly.
        """
        ...


class StepMemory(Protocol):
    """What a model's layers keep of earlier tokens, for the rows of one step."""

    def attend(self, spec: AttentionSpec, heads: Heads) -> Tensor:
        """As `AttentionStep`, over the pages of `spec.pool`."""
        ...

    def attend_latent(
        self,
        pool: int,
        q_nope: Tensor,
        q_rope: Tensor,
        latent: Tensor,
        call: LatentCall,
        chosen: Tensor | None = None,
        /,
    ) -> Tensor:
        """Latent attention: writes the new tokens' latents [T, L + P], rotated part last, into the pages of `pool`,
        then attends over each row's; q_nope [T, H, N] and rotated q_rope [T, H, P] -> [T, H, value size]. `chosen`: to
        those of `choose` alone."""
        ...

    def choose(self, pool: int, call: IndexCall, /) -> Tensor | None:
        """Which positions each token attends to, int32 [T, k]; None: all. Writes the new tokens' index keys into the
        pages of `pool`."""
        ...

    def keep(self, pool: int, x_TN: Tensor, /) -> None:
        """Write a vector of each new token into the pages of `pool`, a `core.memory.Kept`."""
        ...

    def kept(self, pool: int, /) -> tuple[Tensor, Tensor]:
        """The halves of those that stand in the places of the new tokens, [T, N / 2] each, in the type they are kept
        in; by torch's code."""
        ...

    def state(self, pool: int) -> States:
        """Where a recurrent layer's state of each row is read and written; `pool`: the layer's pool index."""
        ...


# Of packed texts or pictures of so many tokens each: what their layers attend by; nothing is kept.
Pack = Callable[["Sequence[int]"], StepMemory]


@dataclass(slots=True)
class Adapted:
    """Which adapter each token of the rows has that are computed now: int32, 0: none; None: no row has one.

    The model says so, and its layers' `Linear.additions` look here: a layer is told nothing of the step.
    """

    index: Tensor | None = None


class Tap(Protocol):
    """What else reads a decoder's hidden states while it runs: a head that drafts, or a trainer's capture.

    It computes by ops of the table alone, so that a step with it can be recorded.
    """

    layers: tuple[int, ...]  # of these the input is wanted: the residual stream before them, not normalised
    last: bool  # and the states behind the last norm, of all tokens

    def before(self, step: ForwardBatch, states: list[Tensor], /) -> None:
        """The residual stream [T, N] before each of `layers`."""
        ...

    def behind(self, step: ForwardBatch, hidden_TN: Tensor, /) -> None:
        """The states that the head reads, of all tokens; where `last`."""
        ...


@dataclass
class Chosen:
    """Which experts the sparse layers choose, by the layer's number: how many a token, and in the step that ran last
    int32 [T, k]. Layers enter when they are built."""

    sizes: dict[int, int] = field(default_factory=dict)
    notes: dict[int, Tensor] = field(default_factory=dict)

    def enter(self, name: str, k: int) -> int:
        """The number of the layer that holds the block of this name."""
        number = next((int(part) for part in name.split(".") if part.isdigit()), len(self.sizes))
        self.sizes[number] = k
        return number


@dataclass(slots=True)
class ForwardBatch:
    """A step as a model sees it. T packed new tokens, L rows whose next token is wanted."""

    input_ids: Tensor  # [T] int64
    positions: Tensor  # [T] int64, or [3, T]: time, height and width of each token
    memory: StepMemory
    logit_index: Tensor | None  # [L] int64: which of the T tokens need logits; None: all, in order
    # int32, 0: none: the adapter of each token [T], and of each row of `logit_index` [L]
    adapters: tuple[Tensor, Tensor] | None = None
    embeds: tuple[Tensor, Tensor] | None = None  # ([n] int64 tokens, [n, N] what stands in for their embeddings)
    deep: Tensor | None = None  # [k, n, N]: added to the same tokens behind each of the first k layers
    types: Tensor | None = None  # [T] int64: which segment of its text a token is in; None: the first
    distances: Tensor | None = None  # for `Heads`


@dataclass(frozen=True)
class BuildContext:
    """Passed down while a model is built: `ctx.child("q_proj")` names the layer below."""

    ops: Ops
    dtype: torch.dtype
    device: torch.device
    name: str = ""
    quant: Method | None = None  # None: weights as the checkpoint has them
    mesh: Mesh = Mesh()
    comm: Comm | None = None  # the ranks of `mesh.tp`; None: this one is alone, or gives its parts of sums
    chosen: Chosen | None = None  # where sparse layers note their choices; None: nobody asks
    spread: Spread | None = None  # experts over more slots than there are, or counted; None: in their order, uncounted
    aside: Aside | None = None  # the host, where routed experts lie there; None: they lie where the model does
    expert_quant: Method | None = None  # of routed experts, where they have another than `quant`
    stager: Stager | None = None  # brings tensors from files to the device; None: through the host
    rows: Rows | None = None  # where groups of ranks attend to rows of their own; None: all ranks to all rows

    def child(self, name: str | int) -> BuildContext:
        return replace(self, name=f"{self.name}.{name}" if self.name else str(name))

    def everywhere(self) -> BuildContext:
        """For what all ranks of a stage share out, whoever's the rows are: `mesh.tp` and `comm` are theirs."""
        if self.rows is None:
            return self
        return replace(self, mesh=self.mesh.whole(), comm=self.rows.comm)
