"""Sampling from the few best tokens of a row, where that gives what the whole row would give.

The head finds the best tokens and the log-sum-exp without writing the row (`Ops.linear_topk`). With top-k, top-p or
min-p, tokens that are not among the best have no part in the draw: the same draw over the candidates, in the order of
their ids, gives the same token. Where the candidates do not reach far enough, or a tie or rounding could decide at
their end, the row is drawn from whole: `sure` says which rows that are not.

Legend: L rows, C candidates, J scales.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from phloem.core.batch import PositionLogprobs
from phloem.engine.sampling.sampler import sample

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from phloem.core.request import SamplingParams
    from phloem.engine.sampling.sampler import SamplingRows
    from phloem.kernels.ops import Ops

FEW = 64  # candidates of a row; more than most nuclei have
MANY = 128  # where someone asks for more than FEW can give
SPARE = 8  # candidates beyond what top-k keeps: the first of them must weigh less than the last that is kept
MARGIN = 1e-5  # relative: far more than float32 sums of exponentials err


def candidates_wanted(params: SamplingParams, plain: bool, logprobs: int, chosen: bool, vocab: int) -> int:
    """How many candidates a request's rows need; 0: whole rows.

    `logprobs`: how many of the best tokens' log probabilities it wants, `chosen` whether those of certain ids.
    """
    if not plain or chosen:
        return 0
    need = max(1, logprobs)
    if not params.greedy:
        if 0 < params.top_k < vocab:
            need = max(need, params.top_k + SPARE)
        elif params.top_p < 1 or params.min_p > 0:
            need = max(need, FEW)
        else:
            return 0
    return FEW if need <= FEW else MANY if need <= MANY else 0


@dataclass(slots=True)
class Candidates:
    """The best tokens of L rows, best first, on the host."""

    values_LC: Tensor
    ids_LC: Tensor  # int32
    sums_LJ: Tensor  # log-sum-exp of the logits, then of logits / temperature; each only if asked for

    @staticmethod
    def scales(rows: SamplingRows, logprobs: bool) -> Tensor:
        """[L, J]: what the sums must be of; only those that a row's log probabilities or nucleus need."""
        found: list[NDArray[np.float32]] = []
        if logprobs:
            found.append(np.ones_like(rows.temperature))
        if (~rows.greedy & (rows.top_p < 1)).any():
            found.append((1 / np.where(rows.greedy, np.float32(1), rows.temperature)).astype(np.float32))
        return torch.from_numpy(np.stack(found, 1) if found else np.empty((len(rows.greedy), 0), np.float32))

    def sure(self, rows: SamplingRows, vocab: int) -> NDArray[np.bool_]:
        """[L]: whether the whole row would give the same draw."""
        if self.values_LC.shape[1] >= vocab:
            return np.ones(len(rows.greedy), np.bool_)
        weights_LC, total_L = self._weights(rows)
        last_L = weights_LC[:, -1]
        count = weights_LC.shape[1]
        k = np.clip(rows.top_k, 1, count)
        kth_L = np.take_along_axis(weights_LC, k[:, None] - 1, 1)[:, 0]
        by_k = (rows.top_k < count) & (kth_L > last_L * (1 + MARGIN))
        wanted_L1 = (rows.top_p.astype(np.float64) * total_L)[:, None]
        sums_LC = weights_LC.cumsum(1)
        far_L = (np.abs(sums_LC - wanted_L1) > MARGIN * total_L[:, None]).all(1)
        by_p = (rows.top_k >= vocab) & (rows.top_p < 1) & (sums_LC[:, -1] > wanted_L1[:, 0]) & far_L
        by_min = (rows.top_k >= vocab) & (rows.top_p >= 1) & (last_L < rows.min_p * (1 - MARGIN))
        return rows.greedy | by_k | by_p | by_min

    def _weights(self, rows: SamplingRows) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Weights relative to the best token's, and their sum over the whole vocabulary."""
        values_LC = self.values_LC.double().numpy()
        temperature_L = np.where(rows.greedy, 1.0, rows.temperature.astype(np.float64))
        with np.errstate(invalid="ignore", over="ignore"):
            weights_LC = np.exp((values_LC - values_LC[:, :1]) / temperature_L[:, None])
            total_L = weights_LC.sum(1)
            if self.sums_LJ.shape[1]:  # of other rows than nuclei it is not used
                total_L = np.exp(self.sums_LJ[:, -1].double().numpy() - values_LC[:, 0] / temperature_L)
        return weights_LC, total_L

    def draw(
        self,
        rows: SamplingRows,
        vocab: int,
        ops: Ops,
        up: Callable[[Sequence[NDArray[Any]]], list[Tensor]] | None = None,
    ) -> Tensor:
        """The token of each row, int64 [L]; right for the rows that are sure."""
        if rows.greedy.all():
            return self.ids_LC[:, 0].long()
        count = self.values_LC.shape[1]
        weights_LC, total_L = self._weights(rows)
        nucleus = (rows.top_k >= vocab) & (rows.top_p < 1)
        with np.errstate(invalid="ignore", divide="ignore"):
            share_L = np.where(nucleus, total_L / weights_LC.sum(1), 1.0)
        top_p = np.minimum(rows.top_p * share_L, 1.0).astype(np.float32)
        few = replace(rows, top_k=np.minimum(rows.top_k, count).astype(np.int32), top_p=top_p)
        ids_LC, order_LC = self.ids_LC.long().sort(dim=-1, stable=True)
        index_L = sample(self.values_LC.gather(1, order_LC), few, ops, up)
        return ids_LC.gather(1, index_L.unsqueeze(1)).squeeze(1)

    def logprobs(self, row: int, token: int, most: int) -> PositionLogprobs:
        """Of the token, which is one of the candidates, and of the `most` best ones, as `position_logprobs`."""
        norm = self.sums_LJ[row, 0]
        place = int((self.ids_LC[row] == token).nonzero()[0])
        found = PositionLogprobs(float(self.values_LC[row, place] - norm))
        top = min(most, self.values_LC.shape[1])
        if top > 0:
            values = (self.values_LC[row, :top] - norm).tolist()
            found.top = list(zip(values, self.ids_LC[row, :top].tolist(), strict=True))
        return found
