"""What is known of the requests that run: prompt and output so far, by slot.

Tokens come from admissions, from what a step gave, and, where the scheduler appended tokens that no step has sampled (a
grammar forced them), from the batch that computes them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from phloem.core.batch import FROM_DEVICE
from phloem.core.media import real_ids

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from phloem.core.batch import Admission, Batch


@dataclass(slots=True)
class Tally:
    """How many of a request's drafts were accepted, and how many were expected to be."""

    right: float = 0.0
    expected: float = 0.0


@dataclass(slots=True, eq=False)
class Text:
    """A running request's tokens. `easy`: its most likely token is all that it wants of a position."""

    request_id: str
    namespace: str  # drafts never come from another one
    tokens: list[int]
    num_prompt: int
    easy: bool
    tally: Tally = field(default_factory=Tally)
    # The drafter's own notes: where its last draft came from, and how much of the text it has indexed.
    followed: tuple[list[int], int] | None = None
    followed_at: int = 0
    indexed: int = 0
    shared: int = 0
    index: dict[tuple[int, ...], list[int]] = field(default_factory=dict[tuple[int, ...], list[int]])
    formed: int = 0
    forms: dict[tuple[int, int], list[int]] = field(default_factory=dict[tuple[int, int], list[int]])

    def put(self, position: int, ids: Sequence[int]) -> None:
        """The tokens from `position` on are these; what is known of them already stays."""
        known = len(self.tokens)
        if position <= known < position + len(ids):
            more = ids[known - position :]
            if FROM_DEVICE not in more:
                self.tokens.extend(more)


def _real(admission: Admission) -> NDArray[np.int32]:
    """Its tokens, those of pictures as the placeholder: nobody drafts content."""
    return real_ids(admission.tokens, admission.media[0].token) if admission.media else admission.tokens


class Texts:
    """The texts of the slots."""

    def __init__(self, slots: int, ended: Callable[[Text], None]) -> None:
        self._texts: list[Text | None] = [None] * slots
        self._ended = ended
        self._last: tuple[NDArray[np.int32] | None, list[Text]] = None, []  # the slots of the last batch, and its texts

    def admit(self, admission: Admission) -> None:
        before = self._texts[admission.slot]
        if before is not None:
            self._ended(before)
        params = admission.params
        plain = not (admission.return_logprob or admission.constrained or params.processors or params.logit_bias)
        free = not (params.frequency_penalty or params.presence_penalty or params.min_new_tokens)
        self._texts[admission.slot] = Text(
            admission.request_id,
            admission.namespace,
            _real(admission).tolist(),
            admission.num_prompt,
            easy=params.greedy and plain and free and params.repetition_penalty == 1.0,
        )

    def of(self, batch: Batch) -> list[Text]:
        """The texts of a batch's rows; those who enter with it are admitted, and forced tokens are taken in."""
        if batch.slots is self._last[0] and not batch.admissions and batch.drafts is None and batch.is_decode:
            return self._last[1]  # the rows of the step before, one token on
        for admission in batch.admissions:
            self.admit(admission)
        texts: list[Text] = []
        for slot in batch.slots.tolist():
            text = self._texts[slot]
            assert text is not None, f"slot {slot} was never admitted"
            texts.append(text)
        if batch.num_tokens != batch.num_rows or batch.drafts is not None:
            self._forced(batch, texts)
        self._last = batch.slots, texts
        return texts

    @staticmethod
    def _forced(batch: Batch, texts: Sequence[Text]) -> None:
        start, ids = 0, batch.input_ids
        for text, count, prefix in zip(texts, batch.query_lens.tolist(), batch.prefix_lens.tolist(), strict=True):
            if prefix + count > len(text.tokens):
                text.put(prefix, ids[start : start + count].tolist())
            start += count
