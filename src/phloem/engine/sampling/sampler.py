"""From logits to tokens.

Every random draw is one uniform number, a function of the request's seed and the token's position alone, inverted
through the distribution's cumulative sum in token-id order. So a seeded request gives the same tokens whatever else is
in the batch, and after a preemption as well.

Legend: L rows, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from phloem.engine.transfer import plain_up
from phloem.kernels.calls import Draw
from phloem.platforms._facts import in_host_memory

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from phloem.core.request import SamplingParams
    from phloem.kernels.ops import Ops

# A nucleus almost always fits in this many tokens; when one does not, its row alone is sorted whole.
CANDIDATES = 1024
EXCLUDED = 1e4  # nats: JSON has no infinity
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def uniforms(seeds: NDArray[np.uint64], positions: NDArray[np.uint64]) -> NDArray[np.float32]:
    """One number in [0, 1) per row: splitmix64 of the seed and the position, its upper 24 bits (Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        z = seeds + _GOLDEN * (positions + np.uint64(1))
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return ((z >> np.uint64(40)).astype(np.float32) * np.float32(2**-24)).astype(np.float32)


class SamplingColumns:
    """What each slot asks for, as host arrays by slot: a step's rows are then one indexing away."""

    def __init__(self, count: int, vocab: int) -> None:
        self._vocab = vocab
        self.temperature = np.zeros(count, np.float32)
        self.top_k = np.zeros(count, np.int32)
        self.top_p = np.zeros(count, np.float32)
        self.min_p = np.zeros(count, np.float32)
        self.seeds = np.zeros(count, np.uint64)
        self.greedy = np.zeros(count, np.bool_)

    def set(self, slot: int, params: SamplingParams, seed: int) -> None:
        self.temperature[slot] = params.temperature
        self.top_k[slot] = params.top_k if 0 < params.top_k < self._vocab else self._vocab
        self.top_p[slot] = params.top_p
        self.min_p[slot] = params.min_p
        self.seeds[slot] = seed & (2**64 - 1)
        self.greedy[slot] = params.greedy

    def rows(self, slots: NDArray[np.integer], positions: NDArray[np.integer]) -> SamplingRows:
        return SamplingRows(
            temperature=self.temperature[slots],
            top_k=self.top_k[slots],
            top_p=self.top_p[slots],
            min_p=self.min_p[slots],
            seeds=self.seeds[slots],
            positions=positions.astype(np.uint64),
            greedy=self.greedy[slots],
        )


@dataclass(slots=True)
class SamplingRows:
    """What L rows ask for, as host arrays. `positions`: of the token that is to be sampled."""

    temperature: NDArray[np.float32]
    top_k: NDArray[np.int32]  # vocabulary size where off
    top_p: NDArray[np.float32]
    min_p: NDArray[np.float32]
    seeds: NDArray[np.uint64]
    positions: NDArray[np.uint64]
    greedy: NDArray[np.bool_]

    @property
    def uniform(self) -> NDArray[np.float32]:
        return uniforms(self.seeds, self.positions)

    def of_rows(self, index: NDArray[np.int64]) -> SamplingRows:
        """What the rows `index` ask for."""
        return SamplingRows(*(getattr(self, field.name)[index] for field in fields(self)))

    def over(self, vocab: int, width: int) -> SamplingRows:
        """The same for logits of `width` tokens, where those of the model are `vocab`."""
        return self if width == vocab else replace(self, top_k=np.where(self.top_k >= vocab, width, self.top_k))

    @staticmethod
    def of(
        params: Sequence[SamplingParams], seeds: Sequence[int], positions: Sequence[int], vocab: int
    ) -> SamplingRows:
        columns = SamplingColumns(len(params), vocab)
        for slot, (item, seed) in enumerate(zip(params, seeds, strict=True)):
            columns.set(slot, item, seed)
        return columns.rows(np.arange(len(params)), np.array(positions, np.int64))


def sample(
    logits_LV: Tensor,
    rows: SamplingRows,
    ops: Ops,
    up: Callable[[Sequence[NDArray[Any]]], list[Tensor]] | None = None,
) -> Tensor:
    """The next token of each row. Returns int64 [L], on the logits' device; `up` brings the rows' settings there."""
    if rows.greedy.all():
        return ops.argmax(logits_LV).long()
    if ops.sample is not None:
        return _draw_by_table(logits_LV, rows, ops.sample, up or plain_up(logits_LV.device)).long()
    drawn = np.flatnonzero(~rows.greedy)
    if len(drawn) == len(rows.greedy):
        return _draw(logits_LV, rows, drawn)
    tokens = ops.argmax(logits_LV).long()
    index = torch.from_numpy(drawn).to(logits_LV.device)
    tokens[index] = _draw(logits_LV[index], rows, drawn)
    return tokens


def _draw_by_table(
    logits_LV: Tensor,
    rows: SamplingRows,
    draw: Callable[[Tensor, Draw], Tensor],
    up: Callable[[Sequence[NDArray[Any]]], list[Tensor]],
) -> Tensor:
    """The table's own sampler; a temperature of 0 stands for greedy."""
    temperature = np.where(rows.greedy, np.float32(0), rows.temperature)
    # In the order of `Draw`.
    columns = (
        temperature,
        rows.top_k,
        rows.top_p,
        rows.min_p,
        rows.seeds.view(np.int64),
        rows.positions.view(np.int64),
    )
    return draw(logits_LV, Draw(*up(columns)))


def _draw(logits_LV: Tensor, rows: SamplingRows, index: NDArray[np.int64]) -> Tensor:
    """Draw for rows `index` (logits hold just these)."""
    device, vocab = logits_LV.device, logits_LV.shape[1]

    def column(values: NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(values[index]).to(device).unsqueeze(1)

    probs_LV = torch.softmax(logits_LV.float() / column(rows.temperature), -1)
    uniform_L1 = column(rows.uniform)
    filtered = (rows.top_k[index] < vocab) | (rows.top_p[index] < 1) | (rows.min_p[index] > 0)
    if not filtered.any():
        return _invert(probs_LV, uniform_L1)
    kept_LV = _filter(probs_LV, column(rows.top_k), column(rows.top_p), column(rows.min_p), rows, index)
    return _invert(kept_LV, uniform_L1)


def processed(
    logits_LV: Tensor,
    rows: SamplingRows,
    up: Callable[[Sequence[NDArray[Any]]], list[Tensor]] | None = None,
) -> Tensor:
    """Logits of which the log-softmax is that of what is drawn from: after temperature and filters; of greedy rows as
    they are. What is excluded is `EXCLUDED` below the best. `up`: as in `sample`."""
    vocab = logits_LV.shape[1]
    heats = np.where(rows.greedy, np.float32(1), rows.temperature)
    filtered = (rows.top_k < vocab) | (rows.top_p < 1) | (rows.min_p > 0)
    index = np.flatnonzero(filtered & ~rows.greedy)
    columns = [index, *(one[index] for one in (rows.top_k, rows.top_p, rows.min_p))] if len(index) else []
    heats_L, *found = (up or plain_up(logits_LV.device))([heats, *columns])
    found_LV = logits_LV.float() / heats_L.unsqueeze(1)
    if found:
        at, k_L1, p_L1, least_L1 = found[0], *(one.unsqueeze(1) for one in found[1:])
        some_LV = found_LV[at]
        kept_LV = _filter(torch.softmax(some_LV, -1), k_L1, p_L1, least_L1, rows, index)
        found_LV[at] = some_LV.masked_fill(kept_LV == 0, -torch.inf)
    return found_LV.clamp_min(found_LV.amax(-1, keepdim=True) - EXCLUDED)


def _filter(
    probs_LV: Tensor, top_k_L1: Tensor, top_p_L1: Tensor, min_p_L1: Tensor, rows: SamplingRows, index: NDArray[np.int64]
) -> Tensor:
    """Zero what top-k, then top-p (of what top-k left), then min-p (relative to the best token) exclude."""
    vocab = probs_LV.shape[1]
    wide = (rows.top_k[index] == vocab) & (rows.top_p[index] < 1)
    size = min(vocab, max(CANDIDATES, int(np.where(rows.top_k[index] < vocab, rows.top_k[index], 0).max())))
    best_LC, ids_LC = torch.topk(probs_LV, size, dim=-1)
    # Whether they are enough the host alone can know; a device would be waited for.
    here, wide_L = in_host_memory(probs_LV.device), torch.from_numpy(wide)
    if size < vocab and wide.any() and (not here or bool((best_LC.sum(-1, keepdim=True) < top_p_L1)[wide_L].any())):
        best_LC, ids_LC = torch.sort(probs_LV, dim=-1, descending=True, stable=True)
    rank_C = torch.arange(best_LC.shape[1], device=probs_LV.device)
    keep_LC = rank_C < top_k_L1
    left_LC = best_LC * keep_LC
    # Without top-k the total is 1 even when the candidates do not reach it.
    total_L1 = torch.where(top_k_L1 < vocab, left_LC.sum(-1, keepdim=True), torch.ones_like(top_p_L1))
    before_LC = left_LC.cumsum(-1) - left_LC
    keep_LC &= (before_LC < top_p_L1 * total_L1) | (rank_C == 0)
    keep_LC &= best_LC >= min_p_L1 * best_LC[:, :1]
    kept_LV = torch.zeros_like(probs_LV).scatter_(1, ids_LC, best_LC * keep_LC)
    # A row that only min-p restricts may keep more tokens than there are candidates.
    free_L1 = (top_k_L1 >= vocab) & (top_p_L1 >= 1)
    return torch.where(free_L1, probs_LV * (probs_LV >= min_p_L1 * best_LC[:, :1]), kept_LV)


def _invert(probs_LV: Tensor, uniform_L1: Tensor) -> Tensor:
    """Inverse of the cumulative distribution at `uniform` (weights need not sum to 1); never a token of weight 0."""
    sums_LV = probs_LV.double().cumsum(-1)
    total_L1 = sums_LV[:, -1:]
    # `right` skips tokens of weight 0 at the front; the clamp keeps rounding from running past the last real token.
    target_L1 = torch.minimum(uniform_L1.double() * total_L1, total_L1 * (1 - 1e-12))
    return torch.searchsorted(sums_LV, target_L1, right=True).squeeze(1).clamp_(max=probs_LV.shape[1] - 1)
