"""What a transcript may look like: its first token, forbidden tokens, and timestamps in pairs that do not go back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from phloem.core.errors import BadRequest
from phloem.engine.processors._base import WHERE, Processor

if TYPE_CHECKING:
    from torch import Tensor

_NEVER = float("-inf")


class LogitProcessor(Processor):
    """The rules of Whisper's decoder (Radford et al., 2022).

    `end`: the token that ends a transcript, above all text; `first_timestamp`: that of 0 s, above all others;
    `timestamps`: whether the transcript has some; `latest_first`: the latest one that it may begin with, counted from
    `first_timestamp`; `suppressed`, `suppressed_first`: tokens that never come, or not as the first.
    """

    keys = frozenset({"end", "first_timestamp", "timestamps", "latest_first", "suppressed", "suppressed_first"})

    def __init__(self, params: dict[str, Any], vocab_size: int) -> None:
        super().__init__(params, vocab_size)
        self._end = self.count(params, "end", None, 0)
        self._first = self.count(params, "first_timestamp", None, 0)
        if not self._end < self._first <= vocab_size:
            raise BadRequest(f"{WHERE}.first_timestamp: expected a token behind `end`", param=WHERE)
        self._timestamps = params.get("timestamps", True)
        if not isinstance(self._timestamps, bool):
            raise BadRequest(f"{WHERE}.timestamps: expected true or false", param=WHERE)
        self._latest = self.count(params, "latest_first", vocab_size, 0)
        self._never, self._not_first = (
            torch.tensor(self.token_ids(params, name) if params.get(name) else [], dtype=torch.int64)
            for name in ("suppressed", "suppressed_first")
        )

    def apply_(self, output: Sequence[int], logits_V: Tensor) -> None:
        logits_V.index_fill_(0, self._never.to(logits_V.device), _NEVER)
        if not output:
            logits_V.index_fill_(0, self._not_first.to(logits_V.device), _NEVER)
        if not self._timestamps:
            logits_V[self._first :] = _NEVER
            return
        first = self._first
        logits_V[self._end + 1 : first] = _NEVER  # tasks, languages: none of them is text
        if not output:
            logits_V[:first] = _NEVER
            logits_V[first + self._latest + 1 :] = _NEVER
            return
        self._pair(output, logits_V)
        if bool(logits_V[first:].logsumexp(0) > logits_V[:first].max()):
            logits_V[:first] = _NEVER  # some timestamp is more likely than any one token of text

    def _pair(self, output: Sequence[int], logits_V: Tensor) -> None:
        """A timestamp ends a segment and the next begins one, or the transcript ends there."""
        first = self._first
        stamped, before = output[-1] >= first, len(output) < 2 or output[-2] >= first
        if stamped and before:
            logits_V[first:] = _NEVER
        elif stamped:
            logits_V[: self._end] = _NEVER
        last = next((token for token in reversed(output) if token >= first), None)
        if last is not None:
            logits_V[first : last if stamped and not before else last + 1] = _NEVER
