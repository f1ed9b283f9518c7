"""What changes a row's logits before a token is chosen: penalties, logit bias, tokens forbidden for now.

Legend: V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from phloem.core.request import SamplingParams
    from phloem.engine.transfer import Up


class Penalties:
    """Token counts of one request that asks for penalties, on the device.

    Repetition (Keskar et al. 2019) looks at prompt and output; presence and frequency (OpenAI) at the output alone.
    """

    def __init__(self, params: SamplingParams, known: Tensor, num_prompt: int, vocab: int, up: Up) -> None:
        """`known`: prompt, then output so far, int64 on the device; `up` brings arrays there."""
        self._repetition = params.repetition_penalty
        self._presence = params.presence_penalty
        self._frequency = params.frequency_penalty
        self._up = up
        self._prompt_V = torch.zeros(vocab, dtype=torch.bool, device=known.device)
        self._prompt_V[known[:num_prompt]] = True
        # Counted without `bincount`, which would wait for the device to learn the largest id.
        self._count_V = torch.zeros(vocab, dtype=torch.float32, device=known.device)
        self.add(known[num_prompt:])

    @staticmethod
    def wanted(params: SamplingParams) -> bool:
        return params.repetition_penalty != 1 or params.presence_penalty != 0 or params.frequency_penalty != 0

    def add(self, tokens_L: Tensor, kept_L: Tensor | None = None) -> None:
        """Count sampled tokens, of which only those in `kept_L` count (None: all); nothing waits for their values."""
        ones = torch.ones(len(tokens_L), device=tokens_L.device) if kept_L is None else kept_L.float()
        self._count_V.index_add_(0, tokens_L.long(), ones)

    def apply_(self, logits_V: Tensor, drafts: Sequence[int] = ()) -> None:
        """Change the logits of the token behind `drafts`, which are taken as output. Tokens that have none are left
        out, and so are logits of none: vocabularies of adapters differ."""
        width = min(len(logits_V), len(self._count_V))
        logits_V, count_V, prompt_V = logits_V[:width], self._count_V[:width], self._prompt_V[:width]
        if drafts:
            (more,) = self._up([np.array(drafts, np.int64)])
            count_V = count_V.index_add(0, more, torch.ones(len(drafts), device=count_V.device))
        if self._repetition != 1:
            scaled_V = torch.where(logits_V > 0, logits_V / self._repetition, logits_V * self._repetition)
            logits_V.copy_(torch.where(prompt_V | (count_V > 0), scaled_V, logits_V))
        if self._frequency or self._presence:
            logits_V.sub_(self._frequency * count_V + self._presence * (count_V > 0))


def bias_arrays(params: SamplingParams) -> list[NDArray[Any]]:
    """Token ids, int64, and values, float32, of `logit_bias`; nothing where there are none."""
    bias = params.logit_bias
    return [np.array([int(key) for key in bias], np.int64), np.array([*bias.values()], np.float32)] if bias else []
