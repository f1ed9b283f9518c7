"""How long a step takes: measured coefficients, or the formulae of a plan."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from phloem.core.errors import ConfigError
from phloem.planning.steps import Work

if TYPE_CHECKING:
    from phloem.planning.steps import Costs


class StepTime(Protocol):
    def __call__(
        self, tokens: float, yields: float, decodes: float, read: float, pairs: float, reach: float, /
    ) -> float:
        """Seconds of a step: its new tokens, the rows that yield one, rows that decode and the tokens that they read
        between them; of prompts the pairs of a new token and one before it, and the tokens that they read at once."""
        ...


@dataclass(frozen=True)
class Measured:
    """`step + max(weights, token T) + row R + read C + pair P`, in seconds, of T tokens, R rows that decode, C tokens
    that these read, P pairs. The default: 8 billion bf16 parameters on one H100, by the formulae of `phloem plan`."""

    step: float = 0.95e-3
    weights: float = 5.6e-3
    token: float = 33e-6
    row: float = 2e-6
    read: float = 49e-9
    pair: float = 1.0e-9

    def __call__(
        self, tokens: float, yields: float, decodes: float, read: float, pairs: float, reach: float, /
    ) -> float:
        del yields, reach
        products = max(self.weights, self.token * tokens)
        return self.step + products + self.row * decodes + self.read * read + self.pair * pairs

    @staticmethod
    def load(path: Path) -> Measured:
        """From a JSON object with some of these names. Raises ConfigError."""
        try:
            found: Any = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"steps {path}: {error}", param="steps") from None
        known = [item.name for item in fields(Measured)]
        if not isinstance(found, dict) or not found:
            raise ConfigError(f"steps {path}: expected an object with some of {', '.join(known)}", param="steps")
        for name, value in found.items():  # pyright: ignore[reportUnknownVariableType]
            if name not in known or isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
                raise ConfigError(f"steps {path}: {name} = {value!r}; seconds of {', '.join(known)}", param="steps")
        return Measured(**found)  # pyright: ignore[reportUnknownArgumentType]


class Planned:
    """The formulae for one layout; a replica's ranks of attention are taken for one that has as much to do as each."""

    def __init__(self, costs: Costs) -> None:
        self._costs = costs

    def __call__(
        self, tokens: float, yields: float, decodes: float, read: float, pairs: float, reach: float, /
    ) -> float:
        share = 1 / self._costs.layout.attn_dp
        work = Work(
            max(tokens * share, 1.0), yields * share, decodes * share, read * share, pairs * share, reach * share
        )
        return self._costs.seconds(work)
