"""Routed experts over ranks with more slots than experts: which slot computes a token's expert, and how often each
expert is chosen. All ranks see all tokens and choose alike, so each knows by itself which slots are meant.

Legend: T tokens, k choices of a token, E experts, S slots of all ranks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from phloem.core.errors import ConfigError
from phloem.distributed.balance import balanced, trivial

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from phloem.distributed.balance import Ranks
    from phloem.distributed.mesh import Axis

    Counts = NDArray[np.int64]  # [sparse layers, E]: tokens that chose the expert


class Spread:
    """What a model's sparse layers have of it. Layers enter when they are built.

    Args:
        redundant: slots beyond the experts.
        counts: by which experts are placed at first, a row for each sparse layer or for each of the model's `layers`;
            None: in their order.
        counting: whether choices are counted.
    """

    def __init__(
        self, redundant: int = 0, counts: Counts | None = None, layers: int = 0, *, counting: bool = False
    ) -> None:
        self.redundant, self.counting = redundant, counting
        self._first, self._of_all = counts, counts is not None and len(counts) == layers
        self.layers: list[SpreadExperts] = []
        self.steps = 0

    def enter(self, name: str, ep: Axis, experts: int, choices: int, device: torch.device) -> SpreadExperts:
        """`name`: of the block. Raises ConfigError where slots cannot be filled so."""
        slots, number = experts + self.redundant, len(self.layers)
        if slots > experts * ep.size:
            why = f"{self.redundant} beyond {experts} experts, of which each of {ep.size} ranks has one at most"
            raise ConfigError(f"ep_num_redundant_experts: {why}", param="ep_num_redundant_experts")
        ranks = trivial(experts, slots, ep.size)
        if self._first is not None:
            number = next((int(part) for part in name.split(".") if part.isdigit()), number) if self._of_all else number
            if number >= len(self._first) or self._first.shape[1] != experts:
                why = (
                    f"counts of {list(self._first.shape)}, and layer {number} of the sparse ones has {experts} experts"
                )
                raise ConfigError(f"init_expert_location: {why}", param="init_expert_location")
            ranks = balanced(self._first[number].astype(np.float64), slots, ep.size)
        found = SpreadExperts(self, len(self.layers), ep, ranks, choices, device)
        self.layers.append(found)
        return found

    def counts(self) -> Counts:
        """How often each expert was chosen since the start, by sparse layer."""
        return np.stack([layer.counts_E.cpu().numpy()[: layer.experts] for layer in self.layers])


class SpreadExperts:
    """Of one sparse layer."""

    def __init__(self, spread: Spread, number: int, ep: Axis, ranks: Ranks, choices: int, device: torch.device) -> None:
        """`choices`: E, and what else may be chosen, behind the experts."""
        self._spread, self.number, self._ep, self._choices, self._device = spread, number, ep, choices, device
        self.experts = len({expert for held in ranks for expert in held})
        self.counts_E = torch.zeros(choices, dtype=torch.int64, device=device)
        self.put(ranks)

    @property
    def rank(self) -> int:
        """This rank among those that have different slots."""
        return self._ep.rank

    @property
    def own(self) -> list[int]:
        """The experts in this rank's slots."""
        return self.ranks[self._ep.rank]

    @property
    def first(self) -> int:
        """This rank's first slot."""
        return self._ep.rank * len(self.own)

    def put(self, ranks: Ranks) -> None:
        """From now on experts are computed there. What is in the slots is the caller's matter."""
        self.ranks = ranks
        places: list[list[int]] = [[] for _ in range(self._choices)]
        for slot, expert in enumerate(expert for held in ranks for expert in held):
            places[expert].append(slot)
        most = max(len(found) for found in places)
        # What is no expert has slot -1, which no rank has.
        table = [(found + [-1] * most)[:most] if found else [-1] * most for found in places]
        self._slots_EC = torch.tensor(table, dtype=torch.int64, device=self._device)
        copies = [max(1, len(found)) for found in places]
        self._copies_E = torch.tensor(copies, dtype=torch.int64, device=self._device)
        self._alone = ranks == trivial(self.experts, self.experts, len(ranks)) and self._choices == self.experts

    def note(self, ids_Tk: Tensor) -> None:
        """Count what was chosen."""
        if self.number == 0:
            self._spread.steps += 1
        if self._spread.counting:
            ids = ids_Tk.reshape(-1).long()
            self.counts_E.scatter_add_(0, ids, torch.ones_like(ids))

    def slots_of(self, ids_Tk: Tensor) -> Tensor:
        """The slots that compute these experts: of an expert's copies each token in turn has another one."""
        if self._alone:
            return ids_Tk
        ids = ids_Tk.long()
        turn_T1 = torch.arange(len(ids), device=ids.device)[:, None]
        return self._slots_EC[ids, turn_T1 % self._copies_E[ids]].to(ids_Tk.dtype)
