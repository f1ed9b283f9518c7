"""A step of which each group of ranks attends to rows of its own (`attn_dp_size`): which those are, and what they give.

A request has a slot, and each slot is of one group: `slot % groups`. So the others need not be told who has what, and
no rank has pages of another group's rows. Each rank takes its rows out of the whole step, which all of them are given.

Legend: R rows, T tokens, L wanted positions, N hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from phloem.attention import Memory
from phloem.engine.forward import run_forward
from phloem.engine.inputs import Step, prompt_positions
from phloem.engine.wanted import Wanted
from phloem.layers.context import ForwardBatch

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from phloem.attention import AttentionBackend
    from phloem.core.batch import Batch
    from phloem.engine.transfer import LastTokens
    from phloem.kvcache.pool import KVPool
    from phloem.layers.rows import Rows


class Shared(Protocol):
    """What a rank has of a model (`engine.stages.Together`)."""

    def forward(self, step: ForwardBatch, /) -> Tensor: ...

    def gathered(self, hidden_LN: Tensor, order_L: Tensor, /) -> Tensor:
        """Hidden states of all groups' wanted positions, those of one group behind another's, in the step's order."""
        ...


@dataclass(frozen=True)
class Part:
    """One group's part of a step."""

    batch: Batch  # its rows alone
    wanted: Wanted
    tokens: list[int]  # of each group
    results: list[int]  # of each group: its wanted positions
    order: NDArray[np.int64]  # [L]: where each wanted position of the step is among those of all groups, in their order
    # int32 [T] and [L] of all groups, in their order: the adapter of each token, and of each wanted position
    adapters: tuple[NDArray[np.int32], NDArray[np.int32]] | None = None

    def adapter_tensors(self, device: torch.device) -> tuple[Tensor, Tensor] | None:
        """As `layers.rows.Rows.begin` takes them."""
        if self.adapters is None:
            return None
        return torch.from_numpy(self.adapters[0]).to(device), torch.from_numpy(self.adapters[1]).to(device)


def places(of: NDArray[np.int32]) -> NDArray[np.int64]:
    """Where each thing is when those of one group stand behind those of another; `of`: the group of each."""
    found = np.empty(len(of), np.int64)
    found[np.argsort(of, kind="stable")] = np.arange(len(of))
    return found


def part_of(batch: Batch, of_R: NDArray[np.int32], groups: int, group: int) -> Part:
    """What a group has of a step whose tokens are known. It may be nothing. `of_R`: each row's group."""
    of_T = np.repeat(of_R, batch.query_lens)
    wanted = Wanted.of(batch).at
    index = np.concatenate([wanted, prompt_positions(batch)]) if batch.prompt_targets else wanted
    of_L = of_T[index]
    mine = np.flatnonzero(of_R == group)
    new = {int(row): at for at, row in enumerate(mine)}
    adapters = None if batch.adapters is None else batch.adapters[mine]
    own = replace(
        batch,
        slots=batch.slots[mine],
        query_lens=batch.query_lens[mine],
        prefix_lens=batch.prefix_lens[mine],
        input_ids=batch.input_ids[of_T == group],
        tables=tuple(table[mine] for table in batch.tables),
        outputs=batch.outputs[mine],
        prompt_targets={new[row]: targets for row, targets in batch.prompt_targets.items() if row in new},
        adapters=adapters if adapters is not None and adapters.any() else None,
    )
    tokens, results = (np.bincount(of, minlength=groups).tolist() for of in (of_T, of_L))
    part = Part(own, Wanted.of(own), tokens, results, places(of_L))
    return part if batch.adapters is None else replace(part, adapters=adapters_of(batch, index, places(of_T), part))


def adapters_of(
    batch: Batch, index: NDArray[np.int64], order_T: NDArray[np.int64], part: Part
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """As `Part.adapters`. `index`: the wanted positions; `order_T`: where each token is among those of all groups."""
    assert batch.adapters is not None
    each_T = np.repeat(batch.adapters, batch.query_lens)
    all_A, all_L = np.zeros(sum(part.tokens), np.int32), np.zeros(len(index), np.int32)
    all_A[order_T], all_L[part.order] = each_T, each_T[index]
    return all_A, all_L


def run_part(
    whole: Shared, rows: Rows, backend: AttentionBackend, pool: KVPool, batch: Batch, last: LastTokens
) -> Tensor:
    """Hidden states [L, N] of the whole step's wanted positions, on rank 0; all of them run it together."""
    part = part_of(batch, batch.slots % rows.dp.size, rows.dp.size, rows.dp.rank)
    rows.begin(part.tokens, part.results, part.adapter_tensors(pool.device))
    if part.batch.num_rows:
        inputs = Step(part.batch, part.wanted, pool, last).inputs
        hidden_LN = run_forward(whole, backend, pool, inputs, inputs.logit_index)
    else:
        hidden_LN = whole.forward(_idle(pool, backend))
    return whole.gathered(hidden_LN, torch.from_numpy(part.order).to(pool.device))


def _idle(pool: KVPool, backend: AttentionBackend) -> ForwardBatch:
    """A step of no rows: nobody asks for its memory (`layers.rows.Resting`)."""
    none = torch.zeros(0, dtype=torch.int64, device=pool.device)
    return ForwardBatch(none, none, Memory(pool, [], backend.ops), none)
