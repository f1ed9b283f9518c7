"""A reasoning block is closed after so many tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from phloem.core.errors import BadRequest
from phloem.engine.processors._base import WHERE, Processor

if TYPE_CHECKING:
    from torch import Tensor


class LogitProcessor(Processor):
    """`thinking_budget`: tokens inside the block; `end_ids`: the tokens that close it, forced when it is spent.

    `start_ids`: the tokens that open it. `inside`: whether the prompt has opened it already. The door fills in all but
    the first from the model's reasoning format.
    """

    keys = frozenset({"thinking_budget", "start_ids", "end_ids", "inside"})

    def __init__(self, params: dict[str, Any], vocab_size: int) -> None:
        super().__init__(params, vocab_size)
        self._budget = self.count(params, "thinking_budget", None, 0)
        self._end = self.token_ids(params, "end_ids")
        inside = params.get("inside", False)
        if not isinstance(inside, bool):
            raise BadRequest(f"{WHERE}.inside: expected true or false", param=WHERE)
        self._start = [] if inside else self.token_ids(params, "start_ids")

    def apply_(self, output: Sequence[int], logits_V: Tensor) -> None:
        begin = _find(output, self._start, 0)
        if begin is None or len(output) < begin + self._budget or _find(output, self._end, begin) is not None:
            return
        # The closing tokens are forced one after the other, from wherever the answer stands in them.
        done = max(size for size in range(len(self._end)) if list(output[len(output) - size :]) == self._end[:size])
        token = self._end[done if len(output) - done >= begin else 0]
        kept = logits_V[token].clone()
        logits_V.fill_(float("-inf"))
        logits_V[token] = kept.clamp(min=0.0)  # a mask may have forbidden it


def _find(output: Sequence[int], wanted: list[int], start: int) -> int | None:
    """Where the first occurrence at or behind `start` ends; `start` for an empty one; None: nowhere."""
    width = len(wanted)
    for at in range(start, len(output) - width + 1):
        if list(output[at : at + width]) == wanted:
            return at + width
    return None
