"""What the engine remembers of each running request between steps."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from phloem.engine.processors import make
from phloem.engine.sampling.candidates import candidates_wanted
from phloem.engine.sampling.penalties import Penalties, bias_arrays
from phloem.engine.sampling.sampler import SamplingColumns
from phloem.engine.transfer import plain_up

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from torch import Tensor

    from phloem.core.batch import Admission, Follower
    from phloem.core.config import LogprobsMode
    from phloem.core.request import SamplingParams
    from phloem.engine.processors import Processor
    from phloem.engine.transfer import Up


@dataclass(slots=True)
class Slot:
    """Sampling state of one request, from admission until its slot is given to another."""

    request_id: str
    params: SamplingParams
    num_prompt: int
    eos_ids: tuple[int, ...]
    return_logprob: bool
    top_logprobs: int
    token_ids_logprob: tuple[int, ...]
    return_hidden: bool
    follower: Follower | None
    penalties: Penalties | None
    bias: tuple[Tensor, Tensor] | None
    output: list[int]  # tokens chosen so far, where processors look at them
    vocab: int
    eos: Tensor | None = None  # `eos_ids` int64 on the device, where `min_new_tokens` forbids them for now
    made: list[Processor] | None = None  # the processors, at their first use
    heat: float = 1.0  # what logits are divided by before log probabilities are taken
    untold: list[int] = field(default_factory=list)  # tokens sampled since the follower was last called

    @property
    def plain(self) -> bool:
        """Nothing touches this row's logits before a token is chosen."""
        free = self.follower is None and self.penalties is None and self.bias is None and not self.params.processors
        return free and self.params.min_new_tokens == 0

    @property
    def follows(self) -> bool:
        """Its next step needs to know, on the host, the token before."""
        return self.follower is not None or bool(self.params.processors)

    def process_(self, logits_V: Tensor, drafts: Sequence[int] = ()) -> None:
        """Let the custom processors change the logits of the token behind `drafts` in place.

        Raises:
            ValueError: if they leave no token; BadRequest as `processors.make` does.
        """
        if self.made is None:
            self.made = make(self.params.processors, self.vocab)
        for processor in self.made:
            processor.apply_([*self.output, *drafts] if drafts else self.output, logits_V)
        if bool(logits_V.isneginf().all()):
            raise ValueError("the logit processors leave no token to choose")


class Slots:
    """All of them. What only decides how a token is chosen is kept in arrays by slot."""

    def __init__(
        self, count: int, vocab: int, device: torch.device, logprobs: LogprobsMode = "raw", up: Up | None = None
    ) -> None:
        """`logprobs`: of which distribution those of sampled tokens are; `up` brings arrays to the device."""
        self._heated, self.processed = logprobs == "temperature", logprobs == "processed"
        self._slots: list[Slot | None] = [None] * count
        self._vocab = vocab
        self._up = up or plain_up(device)
        self.columns = SamplingColumns(count, vocab)
        self.prompts = np.zeros(count, np.int32)  # tokens of each prompt
        # A row of which only its most likely token is wanted: no logits need be written for it.
        self.argmax_only = np.zeros(count, np.bool_)
        # Of those, the rows with nothing else to be looked at on the host.
        self.easy = np.zeros(count, np.bool_)
        self.follows = np.zeros(count, np.bool_)
        self.routed = np.zeros(count, np.bool_)  # whether the experts of its tokens are wanted
        # How many of a row's best tokens are enough to choose one; 0: the whole row is wanted.
        self.candidates = np.zeros(count, np.int32)

    def admit(self, admission: Admission, follower: Follower | None = None, tokens: int = 0) -> None:
        """Give the slot to a request, whose adapter may know more `tokens` than the model. Raises ValueError if its
        constraint was not handed over."""
        vocab = max(self._vocab, tokens)
        if admission.constrained and follower is None:
            raise ValueError(f"request {admission.request_id}: nothing was given that follows its constraint")
        params = admission.params
        penalised, least = Penalties.wanted(params), params.min_new_tokens > 0
        self.columns.set(admission.slot, params, admission.seed)
        self.prompts[admission.slot] = admission.num_prompt
        arrays = [admission.tokens.astype(np.int64)] if penalised else []
        arrays += (bias := bias_arrays(params)) + ([np.array(admission.eos_ids, np.int64)] if least else [])
        tensors = list(self._up(arrays)) if arrays else []
        found = self._slots[admission.slot] = Slot(
            request_id=admission.request_id,
            params=params,
            num_prompt=admission.num_prompt,
            eos_ids=admission.eos_ids,
            return_logprob=admission.return_logprob,
            top_logprobs=admission.top_logprobs,
            token_ids_logprob=admission.token_ids_logprob,
            return_hidden=admission.return_hidden,
            follower=follower if admission.constrained else None,
            penalties=Penalties(params, tensors.pop(0), admission.num_prompt, vocab, self._up) if penalised else None,
            bias=(tensors.pop(0), tensors.pop(0)) if bias else None,
            vocab=vocab,
            eos=tensors.pop(0) if least else None,
            output=admission.tokens[admission.num_prompt :].tolist() if params.processors else [],
        )
        if self._heated and not params.greedy:
            found.heat = params.temperature
        self.argmax_only[admission.slot] = params.greedy and found.plain and not found.return_logprob
        self.easy[admission.slot] = self.argmax_only[admission.slot] and not found.return_hidden
        self.follows[admission.slot] = found.follows
        self.routed[admission.slot] = admission.return_routed
        self.candidates[admission.slot] = candidates_wanted(
            params, found.plain, admission.top_logprobs, bool(admission.token_ids_logprob), self._vocab
        )

    def unfollow(self, slot: int) -> None:
        """Nothing follows this slot's request any more."""
        found = self._slots[slot]
        if found is not None:
            found.follower, found.untold = None, []
            self.follows[slot] = found.follows

    def clear(self) -> None:
        """Forget every request; each must be admitted again before its next row."""
        self._slots = [None] * len(self._slots)
        self.easy[:] = False

    def __getitem__(self, slot: int) -> Slot:
        found = self._slots[slot]
        if found is None:
            raise KeyError(f"slot {slot} was never admitted")
        return found
