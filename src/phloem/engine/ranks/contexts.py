"""A step whose tokens are shared out among ranks that all keep the whole cache (`attn_cp_size`).

Of a long run of a prompt each rank has two blocks, one near its beginning and one as near its end (zigzag): a token
attends to all before it, so that one block each would give the last rank the most to do. A short run, and a row that
decodes, is one rank's. A block is a row of its own, with the pages of its request. In each layer all ranks' keys and
values are gathered, and every rank writes all of them to its pages before its queries look at any. So hits, later
chunks and decoding find on every rank what they would find on one.

Legend: T tokens of the step, A tokens of all ranks, P pieces of rows, L wanted positions, N hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from phloem.attention import StateRows, begin
from phloem.engine.apart import cut
from phloem.engine.forward import run_forward
from phloem.engine.inputs import Step, padded
from phloem.engine.ranks.attending import Part, part_of, places, run_part
from phloem.engine.wanted import Wanted
from phloem.layers.context import Heads

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from phloem.attention import AttentionBackend, Memory
    from phloem.core.batch import Batch
    from phloem.engine.ranks.attending import Shared
    from phloem.engine.transfer import LastTokens
    from phloem.kernels.ops import IndexCall, LatentCall
    from phloem.kvcache.pool import KVPool
    from phloem.layers.context import AttentionSpec, StateStep
    from phloem.layers.rows import Rows


def pieces(
    lens: NDArray[np.int32], slots: NDArray[np.int32], ranks: int
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """(Tokens of each piece [P], its rank [P]), row by row: rows are cut into twice as many blocks as there are ranks,
    block b of which is rank b's or, in the second half, its mirror image's. Rows too short for that stay whole."""
    blocks = 2 * ranks
    zigzag = np.concatenate([np.arange(ranks), np.arange(ranks)[::-1]])
    counts: list[NDArray[np.int64]] = []
    owners: list[NDArray[np.int64]] = []
    for count, slot in zip(lens.tolist(), slots.tolist(), strict=True):
        if count < blocks:
            counts.append(np.array([count]))
            owners.append(np.array([slot % ranks]))
        else:
            counts.append(np.diff(np.arange(blocks + 1) * count // blocks))
            owners.append(zigzag)
    return np.concatenate(counts).astype(np.int32), np.concatenate(owners).astype(np.int32)


@dataclass(frozen=True)
class Share:
    """One rank's part of a step."""

    part: Part  # of rows that are pieces; never without one
    order: NDArray[np.int64]  # [T]: where each token of the step is among those of all ranks; then this rank's filler
    filled: bool  # its only row is a token of nobody, in scratch memory


def share_of(batch: Batch, ranks: int, rank: int) -> Share:
    """What a rank has of a step whose tokens are known. A rank for which nothing is left has a token of nobody:
    layers see rows on every rank, and all meet in each."""
    lens, of_P = pieces(batch.query_lens, batch.slots, ranks)
    part = part_of(cut(batch, lens), of_P, ranks, rank)
    fillers = [int(count == 0) for count in part.tokens]
    tokens = [count + more for count, more in zip(part.tokens, fillers, strict=True)]
    starts = np.cumsum([0, *tokens])
    of_T = np.repeat(of_P, lens)
    # Places count tokens alone: fillers of the ranks before push them on.
    order = places(of_T) + (np.cumsum([0, *fillers])[:-1])[of_T]
    own = part.batch
    adapters = part.adapters
    if adapters is not None:  # a filler has none
        all_A = np.zeros(sum(tokens), np.int32)
        all_A[order] = np.repeat(batch.adapters if batch.adapters is not None else 0, batch.query_lens)
        adapters = all_A, adapters[1]
    if fillers[rank]:
        own = padded(own, 1)
        own = replace(own, outputs=np.zeros(1, np.int32))
        order = np.append(order, starts[rank])
    part = replace(part, batch=own, wanted=Wanted.of(own), tokens=tokens, adapters=adapters)
    return Share(part, order, bool(fillers[rank]))


class SharedMemory:
    """A step's memory on one rank (`layers.context.StepMemory`): what is new goes there from all ranks."""

    def __init__(self, own: Memory, rows: Rows, order: Tensor) -> None:
        """`own`: of this rank's rows, with the places of all that is written, in the order that `order` puts it in."""
        assert own.ops is not None
        self._own, self._ops, self._rows, self._order = own, own.ops, rows, order

    def _all(self, x: Tensor) -> Tensor:
        return self._rows.gather(x.contiguous())[self._order]

    def attend(self, spec: AttentionSpec, heads: Heads) -> Tensor:
        if not spec.writes:
            return self._own.attend(spec, heads)
        ops, q_THD, k_TKD, rotation = self._ops, heads.q, heads.k, heads.rotation
        if rotation is not None:
            if rotation.q_norm is not None and rotation.k_norm is not None:
                q_THD = ops.rms_norm(q_THD, rotation.q_norm, rotation.eps)
                k_TKD = ops.rms_norm(k_TKD, rotation.k_norm, rotation.eps)
            ops.rope_(q_THD, k_TKD, rotation.positions, rotation.cos_sin, rotation.interleaved)
        both = self._all(torch.cat((k_TKD.flatten(1), heads.v.flatten(1)), 1))
        k_A, v_A = both.split([spec.kv_heads * spec.head_size, spec.kv_heads * spec.values], 1)
        k_AKD, v_AKD = (x.unflatten(1, (spec.kv_heads, -1)).contiguous() for x in (k_A, v_A))
        return self._own.attend(spec, Heads(q_THD, k_AKD, v_AKD, heads.sinks, None, heads.distances))

    def attend_latent(
        self,
        pool: int,
        q_nope: Tensor,
        q_rope: Tensor,
        latent: Tensor,
        call: LatentCall,
        chosen: Tensor | None = None,
    ) -> Tensor:
        return self._own.attend_latent(pool, q_nope, q_rope, self._all(latent), call, chosen)

    def choose(self, pool: int, call: IndexCall) -> Tensor | None:
        return self._own.choose(pool, replace(call, keys=self._all(call.keys)))

    def keep(self, pool: int, x_TN: Tensor, /) -> None:
        self._own.keep(pool, self._all(x_TN))

    def kept(self, pool: int, /) -> tuple[Tensor, Tensor]:
        raise ValueError("what drafts runs on one rank alone")

    def state(self, pool: int) -> StateStep:
        raise ValueError("a recurrent layer takes tokens in one after the other")


def run_rows(
    whole: Shared, rows: Rows, backend: AttentionBackend, pool: KVPool, batch: Batch, last: LastTokens
) -> Tensor:
    """Hidden states [L, N] of a step's wanted positions, on rank 0: each group has rows of its own, or tokens."""
    if not rows.context:
        return run_part(whole, rows, backend, pool, batch, last)
    share = share_of(batch, rows.dp.size, rows.dp.rank)
    part = share.part
    rows.begin(part.tokens, part.results, part.adapter_tensors(pool.device))
    everyone = Step(batch, Wanted.of(batch), pool, last).inputs.rows()
    inputs = Step(part.batch, part.wanted, pool, last).inputs
    scratch = torch.zeros(int(share.filled), dtype=torch.int32, device=pool.device)
    batches = [
        own if isinstance(own, StateRows) or isinstance(all_, StateRows)
        else replace(own, token_slots=torch.cat((all_.token_slots, scratch)))
        for own, all_ in zip(inputs.rows(), everyone, strict=True)
    ]  # fmt: skip
    order = torch.from_numpy(share.order).to(pool.device)
    memory = SharedMemory(begin(backend, batches, pool), rows, order)
    hidden_LN = run_forward(whole, backend, pool, inputs, inputs.logit_index, memory)
    return whole.gathered(hidden_LN, torch.from_numpy(part.order).to(pool.device))
