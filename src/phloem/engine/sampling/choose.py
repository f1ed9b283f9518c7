"""Choosing a step's tokens, by the first of several ways that takes the step.

All of them choose the same tokens; they differ in how much of the logits they write. Positions that verify drafts are
positions like any other: which of their tokens count shows when all are chosen (`wanted`).

Legend: L positions, N hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from phloem.engine.sampling.adjust import adjust_
from phloem.engine.sampling.candidates import Candidates
from phloem.engine.sampling.logprobs import Later, logprob_tensors, position_logprobs, read
from phloem.engine.sampling.sampler import processed, sample

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from phloem.core.batch import StepOutput
    from phloem.engine.ranks.stages import Kind
    from phloem.engine.sampling.masks import Masks
    from phloem.engine.sampling.slots import Slot, Slots
    from phloem.engine.transfer import Coming, LastTokens
    from phloem.engine.wanted import Wanted
    from phloem.engine.wearing import Ends
    from phloem.kernels.ops import Ops

# Up to so many rows are sampled from the head's best tokens alone. With more, writing whole rows and looking through
# them costs less than picking the candidates while they are made: `phloem bench kernels` shows both.
FEW_ROWS = 4


@dataclass(slots=True)
class Choice:
    """The positions of a step whose tokens are to be chosen."""

    wanted: Wanted
    slots: list[Slot]  # of each position; empty where `easy`
    easy: bool  # the most likely token of every row, and nothing else
    hidden_LN: Tensor
    output: StepOutput
    began: float  # perf_counter
    entries: NDArray[np.int32] | None = None  # [L] adapters, where some have heads of their own
    late: list[Later] = field(default_factory=list)  # what comes beside the tokens

    def forward_ends(self) -> None:
        """Hidden states and what was made of them by the model are there: sampling begins."""
        self.output.forward_seconds = perf_counter() - self.began


@dataclass(slots=True)
class Asked:
    """Positions whose log probabilities are wanted."""

    places: list[int]  # among the step's L
    index: Tensor  # the same on the device
    logits_LV: Tensor
    tops: list[int]
    chosen: list[tuple[int, ...]]
    ids_LC: Tensor | None  # `chosen`, padded


class Way(Protocol):
    """One way of choosing tokens."""

    def run(self, choice: Choice) -> Coming | None:
        """The tokens of all positions, on their way to the host; None: not by this way."""
        ...


class Chooser:
    """The ways in their order."""

    def __init__(self, ends: Ends, ops: Ops, slots: Slots, last: LastTokens, masks: Masks) -> None:
        self._ways: tuple[Way, ...] = (MostLikely(ends, slots, last), FewCandidates(ends, ops, slots, last))
        self._whole = WholeRows(ends, ops, slots, last, masks)

    def run(self, choice: Choice) -> Coming:
        for way in self._ways:
            coming = way.run(choice)
            if coming is not None:
                return coming
        return self._whole.run(choice)


def most_likely(slots: Slots, wanted: Wanted, easy: bool) -> bool:
    """Whether every position's most likely token is all that is asked of the head; else it gives whole rows, or the
    best of some. `easy`: as in `Choice`."""
    return easy or bool(slots.argmax_only[wanted.slots].all())


def kind_of(slots: Slots, wanted: Wanted, easy: bool) -> Kind:
    """What several ranks make of the states of all positions at once."""
    return "greedy" if most_likely(slots, wanted, easy) else "logits"


class MostLikely:
    """Every row wants its most likely token alone: no logits are kept."""

    def __init__(self, ends: Ends, slots: Slots, last: LastTokens) -> None:
        self._ends, self._slots, self._last = ends, slots, last

    def run(self, choice: Choice) -> Coming | None:
        wanted = choice.wanted
        if not most_likely(self._slots, wanted, choice.easy):
            return None
        tokens_L = self._ends.greedy(choice.hidden_LN, choice.entries)
        choice.forward_ends()
        return self._last.keep(wanted, tokens_L, choice.hidden_LN.sum(-1))


class FewCandidates:
    """A few rows, each of which can be drawn from its best tokens, without whole rows of logits."""

    def __init__(self, ends: Ends, ops: Ops, slots: Slots, last: LastTokens) -> None:
        self._ends, self._ops, self._slots, self._last = ends, ops, slots, last

    def run(self, choice: Choice) -> Coming | None:
        wanted, hidden_LN = choice.wanted, choice.hidden_LN
        many, vocab = self._slots.candidates[wanted.slots], self._ends.vocab_size
        if len(many) > FEW_ROWS or not many.all() or choice.entries is not None:
            return None
        rows = self._ops.whole_logprobs or self._slots.processed
        if any(slot.return_logprob and (rows or slot.heat != 1.0) for slot in choice.slots):
            return None
        settings = self._slots.columns.rows(wanted.slots, wanted.known)
        scale_LJ = Candidates.scales(settings, any(slot.return_logprob for slot in choice.slots))
        norms = scale_LJ.shape[1]
        best = self._ends.best(hidden_LN, min(int(many.max()), vocab), scale_LJ if norms else None, norms)
        if best is None:
            return None
        few = Candidates(*best)
        tokens_L = few.draw(settings, vocab, self._ops, self._last.up)
        whole = np.flatnonzero(~few.sure(settings, vocab))
        logits_WV: Tensor | None = None
        if len(whole):
            index = torch.from_numpy(whole)
            logits_WV = self._ends.logits(hidden_LN[index], None)
            tokens_L[index] = sample(logits_WV, settings.of_rows(whole), self._ops, self._last.up)
        choice.forward_ends()
        coming = self._last.keep(wanted, tokens_L, few.sums_LJ[:, 0] if norms else hidden_LN.sum(-1))
        self._note_logprobs(choice, few, tokens_L, whole, logits_WV)
        return coming

    def _note_logprobs(
        self, choice: Choice, few: Candidates, tokens_L: Tensor, whole: NDArray[Any], logits_WV: Tensor | None
    ) -> None:
        places = {int(i): place for place, i in enumerate(whole)}
        for i, slot in enumerate(choice.slots):
            if not slot.return_logprob:
                continue
            place = places.get(i)
            if place is None or logits_WV is None:
                found = few.logprobs(i, int(tokens_L[i]), min(slot.top_logprobs, slot.vocab))
            else:
                one = logits_WV[place : place + 1]
                found = position_logprobs(one, tokens_L[i : i + 1], slot.top_logprobs, (), self._ops)[0]
            choice.output.logprobs.setdefault(int(choice.wanted.rows[i]), []).append(found)


class WholeRows:
    """All logits of every row: serves every step."""

    def __init__(self, ends: Ends, ops: Ops, slots: Slots, last: LastTokens, masks: Masks) -> None:
        self._ends, self._ops, self._slots, self._last, self._masks = ends, ops, slots, last, masks

    def run(self, choice: Choice) -> Coming:
        """What fails for one row is noted for it alone."""
        wanted, slots = choice.wanted, choice.slots
        logits_LV = self._ends.logits(choice.hidden_LN, choice.entries)
        choice.forward_ends()
        asked = self._asked(slots, logits_LV)
        if not all(slot.plain for slot in slots):
            adjust_(logits_LV, slots, wanted, self._masks)
        settings = self._slots.columns.rows(wanted.slots, wanted.known).over(self._ends.vocab_size, logits_LV.shape[1])
        if asked is not None and self._slots.processed:
            asked.logits_LV = processed(logits_LV[asked.index], settings.of_rows(np.array(asked.places)), self._last.up)
        tokens_L = sample(logits_LV, settings, self._ops, self._last.up)
        self._count(choice, tokens_L)
        coming = self._last.keep(wanted, tokens_L, logits_LV.gather(1, tokens_L.unsqueeze(1)).squeeze(1))
        if asked is not None:
            choice.late.append(self._logprobs(choice, asked, tokens_L))
        return coming

    def _asked(self, slots: Sequence[Slot], logits_LV: Tensor) -> Asked | None:
        """The positions whose log probabilities are wanted, with their logits before anything changes them."""
        places = [i for i, slot in enumerate(slots) if slot.return_logprob]
        if not places:
            return None
        chosen = [slots[i].token_ids_logprob for i in places]
        width = max(map(len, chosen))
        ids = np.zeros((len(places), width), np.int64)
        for row, of_row in zip(ids, chosen, strict=True):
            row[: len(of_row)] = of_row
        heats = np.array([slots[i].heat for i in places], np.float32)
        heated = bool((heats != 1).any())
        arrays = [np.array(places, np.int64), *([ids] if width else []), *([heats] if heated else [])]
        index, *ids_LC = self._last.up(arrays)
        tops = [min(slots[i].top_logprobs, self._ends.vocab_size) for i in places]
        wanted_LV = logits_LV[index]
        if heated:
            wanted_LV = wanted_LV / ids_LC.pop().unsqueeze(1)
        return Asked(places, index, wanted_LV, tops, chosen, ids_LC[0] if ids_LC else None)

    def _logprobs(self, choice: Choice, asked: Asked, tokens_L: Tensor) -> Later:
        """All of them at once, on their way to the host: no request waits for another one's."""
        most = max(asked.tops)
        found = logprob_tensors(asked.logits_LV, tokens_L[asked.index], most, asked.ids_LC, self._ops)
        rows, logprobs = choice.wanted.rows, choice.output.logprobs

        def fill(arrays: list[NDArray[Any]]) -> None:
            for place, item in zip(asked.places, read(arrays, asked.tops, asked.chosen), strict=True):
                logprobs.setdefault(int(rows[place]), []).append(item)

        return Later(self._last.down(found), fill)

    def _count(self, choice: Choice, tokens_L: Tensor) -> None:
        """What the penalties of later tokens follow from."""
        wanted, kept_L = choice.wanted, None
        for start, end in wanted.spans():
            penalties = choice.slots[start].penalties
            if penalties is None:
                continue
            if end - start == 1:
                penalties.add(tokens_L[start:end])
                continue
            if kept_L is None:
                kept_L = wanted.last_on_device(tokens_L, self._last.up)[1]
            penalties.add(tokens_L[start:end], kept_L[start:end])
