"""Tokens that must not come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from phloem.engine.processors._base import Processor

if TYPE_CHECKING:
    from torch import Tensor


class LogitProcessor(Processor):
    """`token_ids`: the tokens that are never chosen."""

    keys = frozenset({"token_ids"})

    def __init__(self, params: dict[str, Any], vocab_size: int) -> None:
        super().__init__(params, vocab_size)
        self._ids = self.token_ids(params, "token_ids")

    def apply_(self, output: Sequence[int], logits_V: Tensor) -> None:
        logits_V[self._ids] = float("-inf")
