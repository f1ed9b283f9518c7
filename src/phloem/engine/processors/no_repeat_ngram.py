"""No sequence of n tokens comes twice in an answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from phloem.engine.processors._base import Processor

if TYPE_CHECKING:
    from torch import Tensor


class LogitProcessor(Processor):
    """`ngram_size` (at least 1); `window_size`: how far back is looked, in tokens (default 256)."""

    keys = frozenset({"ngram_size", "window_size"})

    def __init__(self, params: dict[str, Any], vocab_size: int) -> None:
        super().__init__(params, vocab_size)
        self._size = self.count(params, "ngram_size", None, 1)
        self._window = self.count(params, "window_size", 256, 1)

    def apply_(self, output: Sequence[int], logits_V: Tensor) -> None:
        recent = list(output[-self._window :])
        before = self._size - 1
        if len(recent) <= before:
            return
        last = recent[len(recent) - before :]
        banned = [recent[at] for at in range(before, len(recent)) if recent[at - before : at] == last]
        if banned:
            logits_V[banned] = float("-inf")
