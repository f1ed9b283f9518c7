"""What a model of diffusion says at the masked places of its canvases: a token each, and how likely that is.

A draw is of the request's seed and of the place and pass, so it is the same whatever else the step computes.
Legend: L places, N hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from phloem.core.batch import Filled
from phloem.engine.sampling.logprobs import logprob_tensors, read
from phloem.engine.sampling.sampler import processed, sample

if TYPE_CHECKING:
    from torch import Tensor

    from phloem.core.batch import Places, StepOutput
    from phloem.engine.sampling.slots import Slots
    from phloem.engine.transfer import Coming, LastTokens
    from phloem.engine.wanted import Wanted
    from phloem.kernels.ops import Ops
    from phloem.models import Model

UNSOUND = "the model's logits are not numbers (NaN)"


class Saying:
    """Values of one step's places on their way to the host."""

    def __init__(self, places: Places, wanted: Wanted, coming: Coming, asked: Asked | None) -> None:
        self._places, self._wanted, self._coming, self._asked = places, wanted, coming, asked

    def done(self) -> bool:
        return self._coming.done() and (self._asked is None or self._asked.coming.done())

    def land(self, output: StepOutput) -> None:
        """Wait for them and put them into the output; a row that is not sound fails alone."""
        tokens_L, confidence_L = self._coming.wait()
        output.filled = filled = Filled(tokens_L.astype(np.int32), confidence_L)
        for row in np.unique(self._places.rows[np.isnan(confidence_L)]).tolist():
            output.failed.setdefault(int(row), UNSOUND)
        if self._asked is not None:
            asked = self._asked
            for place, found in zip(asked.places, read(asked.coming.wait(), asked.tops, asked.chosen), strict=True):
                filled.logprobs[place] = found


class Asked:
    """Places whose log probabilities are wanted, and these on their way."""

    def __init__(self, places: list[int], tops: list[int], chosen: list[tuple[int, ...]]) -> None:
        self.places, self.tops, self.chosen = places, tops, chosen
        self.coming: Coming

    @property
    def ids(self) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
        """`chosen`, padded."""
        ids = np.zeros((len(self.places), max(map(len, self.chosen))), np.int64)
        for row, of_row in zip(ids, self.chosen, strict=True):
            row[: len(of_row)] = of_row
        return ids


class Filler:
    """Says what stands at places, from hidden states."""

    def __init__(self, model: Model, ops: Ops, slots: Slots, last: LastTokens) -> None:
        self._model, self._ops, self._slots, self._last = model, ops, slots, last

    def run(self, places: Places, wanted: Wanted, hidden_LN: Tensor) -> Saying:
        logits_LV = self._model.head(hidden_LN)
        logits_LV[:, places.mask] = -torch.inf
        settings = self._slots.columns.rows(wanted.slots, places.draws)
        asked = self._asked(wanted)
        tokens_L = sample(logits_LV, settings, self._ops, self._last.up)
        drawn_LV = logits_LV if settings.greedy.all() else processed(logits_LV, settings, self._last.up)
        chosen_L = drawn_LV.gather(1, tokens_L.long().unsqueeze(1)).squeeze(1)
        confidence_L = (chosen_L - self._ops.logsumexp(drawn_LV)).exp()
        if asked is not None:
            index, *ids = self._last.up([np.array(asked.places, np.int64), *([asked.ids] if any(asked.chosen) else [])])
            most, chosen = max(asked.tops), ids[0] if ids else None
            found = logprob_tensors(logits_LV[index], tokens_L[index], most, chosen, self._ops)
            asked.coming = self._last.down(found)
        return Saying(places, wanted, self._last.down([tokens_L.to(torch.int32), confidence_L.float()]), asked)

    def _asked(self, wanted: Wanted) -> Asked | None:
        slots = [self._slots[slot] for slot in wanted.slots.tolist()]
        places = [place for place, slot in enumerate(slots) if slot.return_logprob]
        if not places:
            return None
        tops = [min(slots[place].top_logprobs, self._model.vocab_size) for place in places]
        return Asked(places, tops, [slots[place].token_ids_logprob for place in places])
