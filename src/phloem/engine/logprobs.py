"""Log probabilities of the distribution before temperature, penalties and masks, in nats.

Legend: L positions, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from phloem.core.batch import PositionLogprobs

if TYPE_CHECKING:
    from collections.abc import Sequence

    from phloem.kernels.ops import Ops


def position_logprobs(
    logits_LV: Tensor, tokens_L: Tensor, top: int, chosen: Sequence[int], ops: Ops
) -> list[PositionLogprobs]:
    """For each position: of its token, of the `top` best tokens, and of the `chosen` ids."""
    norm_L = ops.logsumexp(logits_LV)
    token_L = logits_LV.gather(1, tokens_L.long().unsqueeze(1)).squeeze(1).float() - norm_L
    found = [PositionLogprobs(value) for value in token_L.tolist()]
    if top > 0:
        values_LN, ids_LN = ops.top_k(logits_LV, min(top, logits_LV.shape[1]))
        values = (values_LN.float() - norm_L.unsqueeze(1)).tolist()
        for item, row, ids in zip(found, values, ids_LN.tolist(), strict=True):
            item.top = list(zip(row, ids, strict=True))
    if chosen:
        index = torch.tensor(list(chosen), device=logits_LV.device)
        values = (logits_LV[:, index].float() - norm_L.unsqueeze(1)).tolist()
        for item, row in zip(found, values, strict=True):
            item.chosen = list(zip(row, chosen, strict=True))
    return found
