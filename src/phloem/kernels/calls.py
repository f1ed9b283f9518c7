"""What ops are called with: the shapes of a step, the constants of a layer, weights that are still to be read.

Nothing here computes. Reference ops, tables and kernels all import this file, and it imports none of them. Legend as in
`ops.py`; A adapters, r rank, P parts of a fused layer; L latent size, P rotated part of a latent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

    Cache = tuple[Tensor, Tensor]  # keys and values of one layer, [pages, K, S, D] each


class WeightSource(Protocol):
    """One checkpoint tensor that has not been read yet: a slice of a safetensors file, a GGUF tensor, or dummy data."""

    name: str
    shape: tuple[int, ...]  # logical shape, as torch has it: [out_features, in_features] for a linear weight
    kind: str  # "dense", or a GGUF type name such as "Q4_1"

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The tensor, dequantised if need be, in `dtype`, contiguous, on the CPU."""
        ...

    def raw(self) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """The stored bytes `[out_features, bytes per row]` of a quantised tensor, memory-mapped."""
        ...


class PrepareLinear(Protocol):
    def __call__(self, parts: Sequence[WeightSource], dtype: torch.dtype, device: torch.device) -> Any: ...


class PrepareExperts(Protocol):
    def __call__(
        self, parts: Sequence[WeightSource], dtype: torch.dtype, device: torch.device, experts: int
    ) -> Any: ...


@dataclass(frozen=True, slots=True)
class Norm:
    """An RMS norm of a linear layer's input."""

    weight: Tensor  # [N]
    eps: float


@dataclass(frozen=True, slots=True)
class Adapters:
    """Low-rank additions to a linear layer (LoRA): each of a step's tokens has an adapter, or none.

    The outputs of a token with adapter a become factor * (y + (x downT) up) + shift, where the columns of part p use
    `down[a, p]`. Entry 0 of the stacks is nobody's. Adapters of a smaller rank than the stack's are padded with zeros,
    and an entry of rank 0 changes nothing. Scales are in `up` already. Whatever adapters come and go, all tensors but
    `index` stay where they are, and so may that.
    """

    index: Tensor  # [T] int32: the entry of each token; 0: none
    facts: Tensor  # [A, 2] int32: rank, and whether factor and shift count (1) or are as good as 1 and 0 (0)
    down: Tensor  # [A, P, r, N]
    up: Tensor  # [A, r, M]
    factor: Tensor  # [A, M] float32
    shift: Tensor  # [A, M] float32
    ends: Tensor  # [P] int64, on the host: the column behind each part


class LinearOp(Protocol):
    """A linear layer with all that stands around it, which each table fuses as far as it can.

    activation(norm(x + residual) W^T + bias + adapter) + add. `gate` "silu" or "gelu_tanh": the weight is of a gate and
    an up projection, and the result is activation(gate) * up. `residual` needs `norm`, which excludes `add`.

    Gives the outputs [T, M] (with `gate` [T, M / 2]) and what the residual stream is behind this layer: with `norm`
    x + residual (x itself without a residual); with `add` None where the outputs include it, else `add`, for the norm
    that follows to add; otherwise None.

    Raises:
        ValueError: for shapes that do not fit, and options that exclude each other.
    """

    def __call__(
        self,
        x: Tensor,
        weight: Any,
        bias: Tensor | None = None,
        *,
        norm: Norm | None = None,
        residual: Tensor | None = None,
        gate: str = "",
        add: Tensor | None = None,
        adapter: Adapters | None = None,
    ) -> tuple[Tensor, Tensor | None]: ...


@dataclass(slots=True)
class SharedPages:
    """Which rows of a step begin with the same pages, all int32 on the device. A kernel may ignore it.

    Group g's new tokens are `members[group_start[g] : group_start[g + 1]]`; a row is in one group or in none, with all
    its new tokens. Groups behind the last one are empty. Legend: G groups, M places for their tokens.
    """

    lens: Tensor  # [R] tokens at its start that a row shares, all in the cache before the step; 0: none
    group_start: Tensor  # [G + 1]
    groups: Tensor  # [G, 3] a row with the shared pages, how many tokens they hold, how many of them a part has
    members: Tensor  # [M] packed tokens
    positions: Tensor  # [M] each one's position in its row
    places: Tensor  # [T] where a token stands in `members`; -1: nowhere. Not looked at in a decode step


@dataclass(slots=True)
class PagedBatch:
    """What paged attention must know of a step. All int32, on the device. See `Batch` for the host's side.

    Query tokens of row r are `[query_start[r], query_start[r + 1])`; they are the last ones of its
    `seq_lens[r]` tokens, so the position of token t of row r is `seq_lens[r] - query_len + t - query_start[r]`.
    """

    query_start: Tensor  # [R + 1]
    seq_lens: Tensor  # [R] tokens in the cache once this step's are written
    page_table: Tensor  # [R, P]
    token_slots: Tensor  # [T] page * S + offset: where each new token's KV goes
    max_query_len: int
    max_seq_len: int
    shared: SharedPages | None = None


@dataclass(frozen=True, slots=True)
class Rotation:
    """What a layer wants done to q and k before attention: a norm of each head (weights [D]; None: none), then RoPE."""

    positions: Tensor  # [T] int64 or int32
    cos_sin: Tensor  # [positions, 2, rotary / 2] float32
    interleaved: bool = False  # neighbours are paired, not halves
    q_norm: Tensor | None = None  # both or neither
    k_norm: Tensor | None = None
    eps: float = 0.0


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """How a layer attends: which earlier tokens a token sees, and what becomes of the logits."""

    scale: float
    window: int = 0  # it sees itself and the window - 1 before it (not causal: and as many after it); 0: no limit
    softcap: float = 0.0  # 0: none
    sinks: Tensor | None = None  # [H]: a logit that takes part in the softmax and adds no value
    causal: bool = True  # False: it sees the tokens after it as well
    chunk: int = 0  # it sees its own chunk of this many positions only; 0: no chunks
    block: int = 0  # it sees to the end of its own block of this many positions; 0: to itself

    @property
    def plain(self) -> bool:
        """Whether every kernel serves it."""
        return self.causal and not self.chunk and not self.block


# New tokens of a row up to which latent attention in its absorbed form, recorded, is the faster one on a CPU
# (docs/benchmarks.md).
LATENT_SHORT = 64


@dataclass(frozen=True, slots=True)
class LatentCall:
    """The constants of an MLA layer (DeepSeek-V2): how keys and values come out of a latent."""

    w_uk: Tensor  # [H, N, L]: a head's keys, but for their rotated part, are w_uk latent
    w_uv: Tensor  # [H, L, D]: its values are latent w_uv
    scale: float


@dataclass(frozen=True, slots=True)
class IndexCall:
    """How a layer chooses the earlier tokens that a token attends to (DeepSeek-V3.2): the best by the sum over heads of
    weight * relu(q . key)."""

    q: Tensor  # [T, H, D]
    keys: Tensor  # [T, D], of the new tokens
    weights: Tensor  # [T, H]
    count: int  # tokens at most


@dataclass(frozen=True, slots=True)
class PooledStates:
    """States of a step's R rows where they lie, for an op that reads them there and writes those after the step there
    (`Ops.pooled_states`). No row reads where another writes, nor do two write to one place, but for place 0, whose
    state nobody reads."""

    pool: Tensor  # [places, ...], each place's numbers side by side
    reads: Tensor  # [R] int64
    writes: Tensor  # [R] int64
    fresh: Tensor  # [R] bool: nothing is read, and zeros stand for it


@dataclass(frozen=True, slots=True)
class Draw:
    """What rows of logits are sampled by. A temperature of 0 is greedy; `engine/sampling/sampler.py` specifies the
    result."""

    temperature: Tensor  # [L] float32
    top_k: Tensor  # [L] int32; below 1 or at least V: off
    top_p: Tensor  # [L] float32
    min_p: Tensor  # [L] float32
    seeds: Tensor  # [L] int64
    positions: Tensor  # [L] int64: of the tokens that are drawn
