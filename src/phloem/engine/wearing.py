"""Rows whose adapter has weights of its own (`adapters._worn`) beside rows of others, in one step.

The others run as ever, recorded where they are recorded; then those of each such adapter in a pass of their own, op by
op, in which the layers wear what is the adapter's. The same of the head, which tokens are chosen by.

Legend: R rows, T packed tokens, L wanted positions, N hidden size, V vocabulary, W the longest of an adapter's.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from phloem.engine.apart import part
from phloem.engine.inputs import Step
from phloem.engine.sampling.sampler import EXCLUDED
from phloem.engine.wanted import Wanted

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from numpy.typing import NDArray
    from torch import Tensor

    from phloem.attention import Sharing
    from phloem.core.batch import Batch
    from phloem.engine.forward import Eager, Forward
    from phloem.engine.towers.media import Pictures
    from phloem.engine.transfer import LastTokens
    from phloem.kvcache.pool import KVPool
    from phloem.models import Model

    Split = tuple[int, NDArray[np.int64]]  # an adapter (0: those that wear nothing), and its rows or positions


class Wardrobe(Protocol):
    """As `adapters._sites.Sites`."""

    def owners(self, entries: NDArray[np.int32] | None, /) -> list[int]: ...
    def tokens(self, entry: int, /) -> int: ...
    def wearing(self, entry: int, /) -> AbstractContextManager[None]: ...


def split(wardrobe: Wardrobe, entries: NDArray[np.int32]) -> list[Split]:
    """Places of the entries by who computes them: those of nobody's first, then those of each owner."""
    owners = wardrobe.owners(entries)
    if not owners:
        return [(0, np.arange(len(entries)))]
    others = np.flatnonzero(~np.isin(entries, owners))
    found = [(0, others)] if len(others) else []
    return found + [(entry, np.flatnonzero(entries == entry)) for entry in owners]


class Passes:
    """The forward pass of steps, in several where adapters have weights of their own (`forward.Way`)."""

    def __init__(
        self,
        wardrobe: Wardrobe,
        forward: Forward,
        eager: Eager,
        pool: KVPool,
        last: LastTokens,
        sharing: Sharing | None,
    ) -> None:
        self._wardrobe, self._forward, self._eager = wardrobe, forward, eager
        self._pool, self._last, self._sharing = pool, last, sharing

    def run(self, step: Step, ready: Callable[[], None]) -> Tensor:
        batch = step.batch
        if not self._wardrobe.owners(batch.adapters):
            return self._forward.run(step, ready)
        assert batch.adapters is not None
        ready()  # every pass is given before any of them is waited for
        parts = split(self._wardrobe, batch.adapters)
        rows = np.repeat(np.arange(batch.num_rows), batch.query_lens)[step.logit_index]  # of each wanted position
        whole_LN: Tensor | None = None
        for entry, mine in parts:
            index = torch.from_numpy(np.flatnonzero(np.isin(rows, mine)))
            found_LN = self._pass(entry, step, mine)
            if len(parts) == 1:
                return found_LN
            if whole_LN is None:
                whole_LN = found_LN.new_empty((len(rows), found_LN.shape[1]))
            whole_LN[index.to(found_LN.device)] = found_LN[: len(index)]
        assert whole_LN is not None
        self._last.at = None  # of the last pass alone
        if self._pool.routes is not None:
            self._pool.routes.kept()
        return whole_LN

    def _pass(self, entry: int, step: Step, rows: NDArray[np.int64]) -> Tensor:
        """Hidden states of the wanted positions of these rows."""
        whole = len(rows) == step.batch.num_rows
        part = step if whole else self._part(step, rows)
        if entry:
            with self._wardrobe.wearing(entry):
                found_LN = self._eager.run(part, _nothing)
        else:
            found_LN = self._forward.run(part, _nothing)
        if self._pool.routes is not None and not whole:
            self._pool.routes.keep(part.batch)
        return found_LN

    def _part(self, step: Step, rows: NDArray[np.int64]) -> Step:
        whole, pictures = step.batch, step.pictures
        batch = picked(whole, rows)
        if pictures is not None:
            pictures = pictures_of(pictures, tokens_of(whole, rows), whole.num_tokens)
        return Step(batch, Wanted.of(batch), self._pool, self._last, self._sharing, pictures)


class Ends:
    """A model's head for positions of which some have adapters with weights of their own.

    `wardrobe` None: none have.
    """

    def __init__(self, model: Model, wardrobe: Wardrobe | None = None) -> None:
        self._model, self._wardrobe = model, wardrobe
        self.vocab_size = model.vocab_size

    def tokens(self, batch: Batch) -> dict[int, int]:
        """Slot -> how many token ids its row's adapter knows, of those that have a vocabulary of their own."""
        if self._wardrobe is None or not self._wardrobe.owners(batch.adapters):
            return {}
        assert batch.adapters is not None
        rows = zip(batch.slots.tolist(), batch.adapters.tolist(), strict=True)
        return {slot: self._wardrobe.tokens(entry) for slot, entry in rows if entry}

    def entries(self, batch: Batch, wanted: Wanted) -> NDArray[np.int32] | None:
        """[L]: the adapter of each position; None: no head but the model's is asked."""
        if self._wardrobe is None or not self._wardrobe.owners(batch.adapters):
            return None
        assert batch.adapters is not None
        return batch.adapters[wanted.rows]

    def logits(self, hidden_LN: Tensor, entries_L: NDArray[np.int32] | None) -> Tensor:
        """float32 [L, V], or [L, W]: beyond the tokens of a row's own vocabulary -inf."""
        if entries_L is None or self._wardrobe is None:
            return self._model.head(hidden_LN)
        parts = [(places, self._of(entry, hidden_LN, places)) for entry, places in split(self._wardrobe, entries_L)]
        most = max(logits.shape[1] for _, logits in parts)
        whole_LW = hidden_LN.new_full((len(entries_L), most), float("-inf"), dtype=torch.float32)
        for places, logits in parts:
            whole_LW[torch.from_numpy(places).to(hidden_LN.device), : logits.shape[1]] = logits
        return whole_LW

    def greedy(self, hidden_LN: Tensor, entries_L: NDArray[np.int32] | None) -> Tensor:
        """The most likely token of each position, integer [L]."""
        if entries_L is None or self._wardrobe is None:
            return self._model.greedy(hidden_LN)
        tokens_L = torch.zeros(len(entries_L), dtype=torch.int64, device=hidden_LN.device)
        for entry, places in split(self._wardrobe, entries_L):
            index = torch.from_numpy(places).to(hidden_LN.device)
            if entry:
                tokens_L[index] = self._of(entry, hidden_LN, places).argmax(-1)
            else:
                tokens_L[index] = self._model.greedy(hidden_LN[index]).long()
        return tokens_L

    def best(
        self, hidden_LN: Tensor, k: int, scale_LJ: Tensor | None, norms: int
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """As `Head.best`, of the model's own."""
        return self._model.best(hidden_LN, k, scale_LJ, norms)

    def of_row(self, hidden_LN: Tensor, entry: int) -> Tensor:
        """float32 logits of positions of one row, of all tokens that it may have: those that its head does not give are
        `EXCLUDED` below the best."""
        logits_LV = self.logits(hidden_LN, np.full(len(hidden_LN), entry, np.int32) if entry else None)
        width = logits_LV.shape[1] if self._wardrobe is None else self._wardrobe.tokens(entry)
        if width <= logits_LV.shape[1]:
            return logits_LV
        rest_LW = (logits_LV.amax(-1, keepdim=True) - EXCLUDED).expand(-1, width - logits_LV.shape[1])
        return torch.cat([logits_LV, rest_LW], 1)

    def _of(self, entry: int, hidden_LN: Tensor, places: NDArray[np.int64]) -> Tensor:
        some_LN = hidden_LN if len(places) == len(hidden_LN) else hidden_LN[torch.from_numpy(places)]
        if not entry or self._wardrobe is None:
            return self._model.head(some_LN)
        with self._wardrobe.wearing(entry):
            return self._model.head(some_LN)


def tokens_of(batch: Batch, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Which of the batch's T tokens are of these rows, in their order."""
    lens, starts = batch.query_lens[rows], (np.cumsum(batch.query_lens) - batch.query_lens)[rows]
    return np.repeat(starts - (np.cumsum(lens) - lens), lens) + np.arange(lens.sum())


def picked(batch: Batch, rows: NDArray[np.int64]) -> Batch:
    """Some rows of a batch that verifies no drafts, as a batch."""
    at = tokens_of(batch, rows)
    adapters = None if batch.adapters is None else batch.adapters[rows]
    place = np.full(batch.num_tokens, -1)
    place[at] = np.arange(len(at))
    new = {int(row): number for number, row in enumerate(rows)}
    return replace(
        part(batch, rows, at),
        adapters=adapters if adapters is not None and adapters.any() else None,
        admissions=[],
        prompt_targets={new[row]: targets for row, targets in batch.prompt_targets.items() if row in new},
        embeds=[replace(one, start=int(place[one.start])) for one in batch.embeds if place[one.start] >= 0],
        drafts=None,
        drafting=None,
    )


def pictures_of(pictures: Pictures, at: NDArray[np.int64], count: int) -> Pictures | None:
    """What of a step's pictures is of these of its `count` tokens."""
    device = pictures.index.device
    place = torch.full((count,), -1, dtype=torch.int64, device=device)
    place[torch.from_numpy(at).to(device)] = torch.arange(len(at), device=device)
    index = place[pictures.index]
    kept = index >= 0
    if not bool(kept.any()):
        return None
    spans = [(int(place[first]), size, end) for first, size, end in pictures.spans if int(place[first]) >= 0]
    return replace(pictures, index=index[kept], values=pictures.values[kept], spans=spans)


def _nothing() -> None:
    """The step's own `ready` has been called."""
