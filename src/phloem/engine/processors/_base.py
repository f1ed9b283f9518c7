"""What a logit processor is, and how it reads its parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from phloem.core.errors import BadRequest

if TYPE_CHECKING:
    from torch import Tensor

WHERE = "custom_params"
MAX_IDS = 65_536


class Processor:
    """Base of the processors. It keeps no state: the same output gives the same change, after a preemption too.

    Args:
        params: `custom_params` of the request; a key outside of `keys` is refused.

    Raises:
        BadRequest: naming the parameter.
    """

    keys: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, params: dict[str, Any], vocab_size: int) -> None:
        self.vocab_size = vocab_size
        for name in params:
            if name not in self.keys:
                known = ", ".join(sorted(self.keys))
                raise BadRequest(f"unknown field '{WHERE}.{name:.100}'; known: {known}", param=WHERE)

    def apply_(self, output: Sequence[int], logits_V: Tensor) -> None:
        """Change the logits of the next token in place. `output`: the tokens of this request so far."""
        raise NotImplementedError

    def token_ids(self, params: dict[str, Any], name: str) -> list[int]:
        """A required list of token ids."""
        ids = params.get(name)
        if not isinstance(ids, list) or not ids or any(not isinstance(i, int) or isinstance(i, bool) for i in ids):
            raise BadRequest(f"{WHERE}.{name}: expected a list of token ids", param=WHERE)
        if len(ids) > MAX_IDS:
            raise BadRequest(f"{WHERE}.{name} takes at most {MAX_IDS} token ids, got {len(ids)}", param=WHERE)
        for token in ids:
            if not 0 <= token < self.vocab_size:
                raise BadRequest(f"{WHERE}.{name}: token id {token} is not in [0, {self.vocab_size})", param=WHERE)
        return ids

    @staticmethod
    def count(params: dict[str, Any], name: str, default: int | None, low: int) -> int:
        """A whole number of at least `low`."""
        value = params.get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < low:
            raise BadRequest(f"{WHERE}.{name}: expected a whole number of at least {low}", param=WHERE)
        return value
