"""Log probabilities of the distribution before temperature, penalties and masks, in nats.

Legend: L positions, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from phloem.core.batch import PositionLogprobs

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from phloem.engine.transfer import Coming
    from phloem.kernels.ops import Ops


def logprob_tensors(logits_LV: Tensor, tokens_L: Tensor, top: int, chosen_LC: Tensor | None, ops: Ops) -> list[Tensor]:
    """What `read` reads, on the logits' device: nothing waits for it.

    Log probabilities of the tokens [L], with `top` those of the best tokens and their ids [L, top], with `chosen_LC`
    those of these ids [L, C].
    """
    norm_L = ops.logsumexp(logits_LV)
    found = [logits_LV.gather(1, tokens_L.long().unsqueeze(1)).squeeze(1).float() - norm_L]
    if top > 0:
        values_LN, ids_LN = ops.top_k(logits_LV, min(top, logits_LV.shape[1]))
        found += [values_LN.float() - norm_L.unsqueeze(1), ids_LN]
    if chosen_LC is not None:
        found.append(logits_LV.gather(1, chosen_LC).float() - norm_L.unsqueeze(1))
    return found


def read(
    arrays: Sequence[NDArray[Any]], tops: Sequence[int], chosen: Sequence[Sequence[int]]
) -> list[PositionLogprobs]:
    """For each position, as many of the best tokens as it wants, and of the ids that it has chosen."""
    token_L, *rest = arrays
    found = [PositionLogprobs(value) for value in token_L.tolist()]
    if any(tops):
        values_LN, ids_LN, *rest = rest
        for item, top, values, ids in zip(found, tops, values_LN, ids_LN, strict=True):
            item.top = list(zip(values[:top].tolist(), ids[:top].tolist(), strict=True))
    if rest:
        for item, ids, values in zip(found, chosen, rest[0], strict=True):
            item.chosen = list(zip(values[: len(ids)].tolist(), ids, strict=True))
    return found


@dataclass(slots=True)
class Later:
    """What a step gives beside its tokens, on its way to the host; `fill` puts it where it belongs."""

    coming: Coming
    fill: Callable[[list[NDArray[Any]]], None]

    def land(self) -> None:
        self.fill(self.coming.wait())


def position_logprobs(
    logits_LV: Tensor, tokens_L: Tensor, top: int, chosen: Sequence[int], ops: Ops
) -> list[PositionLogprobs]:
    """For each position: of its token, of the `top` best tokens, and of the `chosen` ids."""
    count = len(logits_LV)
    chosen_LC = torch.tensor([list(chosen)] * count, device=logits_LV.device) if chosen else None
    found = logprob_tensors(logits_LV, tokens_L, top, chosen_LC, ops)
    return read([tensor.cpu().numpy() for tensor in found], [top] * count, [chosen] * count)
