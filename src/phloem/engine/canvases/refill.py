"""What a model says at the places of canvases that are drawn anew: a token each, the likeliest one, and the entropy.

A pass reads, beside its canvas's tokens, what the pass before made likely: its distribution times the table of
embeddings, kept here by slot until the canvas is done.

Legend: L places of a step, C of a canvas, N hidden size, V vocabulary.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch

from phloem.core.batch import Filled
from phloem.engine.canvases.canvas import PASS
from phloem.engine.canvases.fill import UNSOUND, Asked
from phloem.engine.sampling.logprobs import logprob_tensors, read
from phloem.engine.sampling.sampler import sample
from phloem.engine.towers.media import Pictures

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from phloem.core.batch import Batch, Places, StepOutput
    from phloem.engine.sampling.slots import Slots
    from phloem.engine.transfer import Coming, LastTokens
    from phloem.engine.wanted import Wanted
    from phloem.kernels.ops import Ops
    from phloem.models import Conditioned

PART = 64  # places whose logits are there at a time


class Redrawing:
    """Values of one step's places on their way to the host."""

    def __init__(self, places: Places, coming: Coming, asked: list[Asked]) -> None:
        self._places, self._coming, self._asked = places, coming, asked

    def done(self) -> bool:
        return self._coming.done() and all(one.coming.done() for one in self._asked)

    def land(self, output: StepOutput) -> None:
        """As `fill.Saying.land`."""
        tokens_L, best_L, entropy_L = self._coming.wait()
        output.filled = filled = Filled(tokens_L.astype(np.int32), entropy_L, best=best_L.astype(np.int32))
        for row in np.unique(self._places.rows[np.isnan(entropy_L)]).tolist():
            output.failed.setdefault(int(row), UNSOUND)
        for asked in self._asked:
            for place, found in zip(asked.places, read(asked.coming.wait(), asked.tops, asked.chosen), strict=True):
                filled.logprobs[place] = found


class Refiller:
    """Says what stands at the places of canvases, and keeps what that adds to their next pass."""

    def __init__(self, model: Conditioned, ops: Ops, slots: Slots, last: LastTokens) -> None:
        self._model, self._ops, self._slots, self._last = model, ops, slots, last
        self._soft: dict[int, Tensor] = {}  # by slot: [C, N]

    def forget(self) -> None:
        self._soft.clear()

    def dress(self, batch: Batch, places: Places) -> Pictures:
        """What stands in for the embeddings of the canvases' tokens, and where they are."""
        spans: list[tuple[int, int, int]] = []
        soft: list[Tensor] = []
        for row, own in _rows(places):
            first, size = int(places.at[own.start]), own.stop - own.start
            spans.append((first, size, int(batch.prefix_lens[row] + batch.query_lens[row])))
            kept = self._soft.get(int(batch.slots[row])) if int(places.draws[own.start]) >> PASS else None
            soft.append(self._nothing(size) if kept is None else kept)
        ids_L, index_L = self._last.up([batch.input_ids[places.at].astype(np.int64), places.at])
        values_LN = self._model.condition(ids_L, torch.cat(soft))
        return Pictures(index_L, values_LN, self._model.hidden_size, spans, canvases=True)

    def _nothing(self, size: int) -> Tensor:
        return torch.zeros(size, self._model.hidden_size, dtype=torch.float32, device=self._last.values.device)

    def run(self, places: Places, wanted: Wanted, hidden_LN: Tensor) -> Redrawing:
        assert places.heat is not None
        settings = self._slots.columns.rows(wanted.slots, places.draws)
        (heat_L,) = self._last.up([places.heat])
        asked: list[Asked] = []
        found: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        for begin in range(0, len(places.at), PART):
            part = slice(begin, begin + PART)
            logits_LV = self._model.head(hidden_LN[part])
            hot_LV = logits_LV / heat_L[part, None]
            if (one := self._logprobs(wanted, begin, logits_LV)) is not None:
                asked.append(one)
            rows = settings.of_rows(np.arange(*part.indices(len(places.at))))
            drawn_L = sample(hot_LV, rows, self._ops, self._last.up)
            log_LV = hot_LV.log_softmax(-1)
            weights_LV = log_LV.exp()
            # A weight of 0 adds nothing, though its logarithm may have no bound.
            entropy_L = -(weights_LV * log_LV.clamp_min(torch.finfo(torch.float32).min)).sum(-1)
            found.append((drawn_L, hot_LV.argmax(-1), entropy_L, self._model.soften(weights_LV)))
        drawn_L, best_L, entropy_L, soft_LN = (torch.cat(each) for each in zip(*found, strict=True))
        for _, own in _rows(places):
            self._soft[int(wanted.slots[own.start])] = soft_LN[own].clone()
        down = [drawn_L.to(torch.int32), best_L.to(torch.int32), entropy_L.float()]
        return Redrawing(places, self._last.down(down), asked)

    def _logprobs(self, wanted: Wanted, begin: int, logits_LV: Tensor) -> Asked | None:
        """Those of the likeliest tokens of the places from `begin` on, where they are wanted."""
        slots = [self._slots[slot] for slot in wanted.slots[begin : begin + len(logits_LV)].tolist()]
        some = [at for at, slot in enumerate(slots) if slot.return_logprob]
        if not some:
            return None
        tops = [min(slots[at].top_logprobs, logits_LV.shape[1]) for at in some]
        asked = Asked([begin + at for at in some], tops, [slots[at].token_ids_logprob for at in some])
        index, *ids = self._last.up([np.array(some, np.int64), *([asked.ids] if any(asked.chosen) else [])])
        wide_LV = logits_LV[index]
        found = logprob_tensors(wide_LV, wide_LV.argmax(-1), max(tops), ids[0] if ids else None, self._ops)
        asked.coming = self._last.down(found)
        return asked


def _rows(places: Places) -> Iterator[tuple[int, slice]]:
    """(Row, which of the step's places are its) in their order."""
    borders = np.flatnonzero(np.diff(places.rows)) + 1
    starts = [0, *borders.tolist(), len(places.rows)]
    for begin, end in pairwise(starts):
        yield int(places.rows[begin]), slice(begin, end)
