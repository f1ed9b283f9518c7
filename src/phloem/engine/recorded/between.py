"""What a model takes for its memory while its steps are recorded in pieces: what depends on rows ends a piece.

Attention, latent attention and its choice of keys, and what recurrent layers do with their states, run eagerly between
the pieces, of the step that then is and over its true tokens. Their results go to buffers that stay: one for all layers
and sizes, for a layer has used its own up before the next one comes. Vectors that are kept of tokens (of heads that
draft) are written and read within a piece, for where each token lies is an input of it.

Legend: T tokens of the step, B tokens of the size that is recorded, H heads, D head size, N hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from phloem.attention import Memory
from phloem.core.memory import Kept
from phloem.kernels.calls import PagedBatch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from phloem.attention import StateRows
    from phloem.engine.recorded.looks import Looks
    from phloem.kernels.calls import IndexCall, LatentCall
    from phloem.kernels.graph import Cut
    from phloem.kernels.ops import Ops
    from phloem.kvcache.pool import KVPool
    from phloem.layers.context import AttentionSpec, ForwardBatch, Heads, StateStep, StepMemory


@dataclass(slots=True)
class TokenInputs:
    """The fixed inputs of pieces of one size."""

    input_ids: Tensor  # [B] int64
    positions: Tensor  # [B] int64
    # By group of memory that keeps a vector of each token: [B] int32, where it lies. Padding lies in scratch.
    slots: dict[int, Tensor] = field(default_factory=dict)

    @staticmethod
    def of(size: int, pool: KVPool) -> TokenInputs:
        """Tokens 0 at position 0 of scratch memory."""
        ids, positions = (torch.zeros(size, dtype=torch.int64, device=pool.device) for _ in range(2))
        groups = {pool.group_of[number] for number, spec in enumerate(pool.memory) if isinstance(spec, Kept)}
        slots = {group: torch.zeros(size, dtype=torch.int32, device=pool.device) for group in sorted(groups)}
        return TokenInputs(ids, positions, slots)

    def fill(self, ids_T: Tensor, positions_T: Tensor, rows: Sequence[PagedBatch | StateRows]) -> None:
        """Put a step's tokens in; `rows`: of each group."""
        pairs = [(self.input_ids, ids_T), (self.positions, positions_T)]
        for group, slots in self.slots.items():
            batch = rows[group]
            assert isinstance(batch, PagedBatch), "what is kept of tokens names a pool of states"
            pairs.append((slots, batch.token_slots))
        tokens = len(ids_T)
        for into, source in pairs:
            into[:tokens] = source
            if tokens < len(into):
                into[tokens:] = 0


class AtOnce:
    """No cuts: each call runs where it stands."""

    def __call__(self, call: Callable[[], None], more: bool = True) -> None:
        call()

    def hold(self, x: Tensor) -> Tensor:
        return x


class Between:
    """A step's memory (`layers.context.StepMemory`) in pieces. Used by one thread alone.

    `limit`: most tokens of a step; `looks`: told of each cut.
    """

    def __init__(self, pool: KVPool, ops: Ops, limit: int, looks: Looks) -> None:
        self.cut: Cut = AtOnce()
        self._pool, self._ops, self._look, self._limit = pool, ops, looks.look, limit
        self._cuts, self._all = 0, 0  # of this forward pass, and of every one; 0: none has ended
        self.ends = False  # nothing is computed behind the last of them
        self._last: Tensor | None = None  # where the result of the last one goes
        self._step: StepMemory | None = None
        self._tokens = 0
        self._outs: dict[tuple[Any, ...], Tensor] = {}
        self._chosen: dict[int, Tensor | None] = {}  # by pool, in the step that runs
        self._marks: dict[int, Tensor] = {}  # by pool: what stands for such a choice
        self._vectors: Memory | None = None

    def run(
        self,
        trunk: Callable[[ForwardBatch], tuple[Tensor, Tensor]],
        step: ForwardBatch,
        fixed: TokenInputs,
        late: bool,
    ) -> tuple[Tensor, Tensor]:
        """`trunk` of the step, in pieces if `cut` says so: (the last mixer's output, the residual). `late`: as
        `models.CutModel.late_residual`."""
        self._vectors = self._kept_by(fixed)
        self._cuts = 0
        out, residual_BN = trunk(step)
        if not self._all:
            given = self._last is not None and out.untyped_storage().data_ptr() == self._last.data_ptr()
            self._all, self.ends, self._last = self._cuts, given and not late, None
        return out, residual_BN

    def begin(self, step: StepMemory, tokens: int) -> None:
        """What runs between the pieces is this step's."""
        self._step, self._tokens = step, tokens
        for out_B in self._outs.values():
            # What is left of a longer step need not be finite, and a router must not see that.
            if tokens < self._limit:
                out_B[tokens:] = 0

    def end(self) -> None:
        self._step = None
        self._chosen.clear()

    def drop(self) -> None:
        self._outs.clear()

    @property
    def nbytes(self) -> int:
        return sum(out_B.nbytes for out_B in list(self._outs.values()))

    @property
    def step(self) -> StepMemory:
        """Of the step that runs."""
        assert self._step is not None, "pieces are replayed within a step"
        return self._step

    def eagerly(self, call: Callable[[], None]) -> None:
        """End the piece; `call` runs in every replay."""
        self._cuts += 1
        self.cut(call, more=not (self.ends and self._cuts == self._all))

    def true(self, x_B: Tensor) -> Tensor:
        """The step's own tokens."""
        return x_B[: self._tokens]

    def out(self, kind: str, shape: Sequence[int], like: Tensor) -> Tensor:
        """Where a result [B, ...] goes that has this shape behind its tokens."""
        key = kind, tuple(shape), like.dtype
        if key not in self._outs:
            self._outs[key] = torch.zeros((self._limit, *shape), dtype=like.dtype, device=like.device)
        if not self._all:
            self._last = self._outs[key]
        return self._outs[key][: len(like)]

    def attend(self, spec: AttentionSpec, heads: Heads) -> Tensor:
        self._look()
        hold, out_BHD = self.cut.hold, self.out("heads", (spec.heads, spec.values), heads.q)
        held = replace(heads, q=hold(heads.q), k=hold(heads.k), v=hold(heads.v))
        self.eagerly(lambda: self._attend(spec, held, out_BHD))
        return out_BHD

    def _attend(self, spec: AttentionSpec, held: Heads, out_BHD: Tensor) -> None:
        turn = held.rotation
        if turn is not None:
            turn = replace(turn, positions=self.true(turn.positions))
        q, k, v = (self.true(x) for x in (held.q, held.k, held.v))
        self.true(out_BHD).copy_(self.step.attend(spec, replace(held, q=q, k=k, v=v, rotation=turn)))

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
        self._look()
        hold, out_BHD = self.cut.hold, self.out("latent", (q_nope.shape[1], call.w_uv.shape[2]), q_nope)
        q_nope, q_rope, latent = hold(q_nope), hold(q_rope), hold(latent)
        of = next((number for number, mark in self._marks.items() if mark is chosen), None)

        def attend() -> None:
            which = None if of is None else self._chosen[of]
            nope, rope, new = self.true(q_nope), self.true(q_rope), self.true(latent)
            self.true(out_BHD).copy_(self.step.attend_latent(pool, nope, rope, new, call, which))

        self.eagerly(attend)
        return out_BHD

    def choose(self, pool: int, call: IndexCall, /) -> Tensor:
        """A mark that `attend_latent` knows: the choice is the step's, and may be of everything."""
        hold = self.cut.hold
        held = replace(call, q=hold(call.q), keys=hold(call.keys), weights=hold(call.weights))

        def choose() -> None:
            q, keys, weights = (self.true(x) for x in (held.q, held.keys, held.weights))
            self._chosen[pool] = self.step.choose(pool, replace(held, q=q, keys=keys, weights=weights))

        self.eagerly(choose)
        return self._marks.setdefault(pool, torch.empty(0, dtype=torch.int32))

    def state(self, pool: int) -> Recorded:
        self._look()
        return Recorded(self, pool)

    def keep(self, pool: int, x_BN: Tensor, /) -> None:
        assert self._vectors is not None
        self._vectors.keep(pool, x_BN)

    def kept(self, pool: int, /) -> tuple[Tensor, Tensor]:
        assert self._vectors is not None
        return self._vectors.kept(pool)

    def _kept_by(self, fixed: TokenInputs) -> Memory | None:
        """Keeps vectors of the fixed inputs' tokens."""
        if not fixed.slots:
            return None
        none = torch.zeros(0, dtype=torch.int32, device=fixed.input_ids.device)
        batches = [
            PagedBatch(none, none, none, fixed.slots.get(group, none), 1, 1) for group in range(len(self._pool.groups))
        ]
        return Memory(self._pool, (), self._ops, batches)


class Recorded:
    """The states of one recurrent layer in pieces (`layers.context.States`)."""

    def __init__(self, between: Between, pool: int) -> None:
        self._between, self._pool, self._runs = between, pool, 0

    def run(self, call: Callable[..., Tensor], *of_B: Tensor) -> Tensor:
        between, pool = self._between, self._pool
        self._runs += 1
        out = between.out(f"states, {self._runs}", of_B[0].shape[1:], of_B[0])
        held = [between.cut.hold(x) for x in of_B]

        def run() -> None:
            states: StateStep | Any = between.step.state(pool)
            between.true(out).copy_(states.run(call, *(between.true(x) for x in held)))

        between.eagerly(run)
        return out
