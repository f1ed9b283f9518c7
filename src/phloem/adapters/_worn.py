"""What an adapter has of its own beside additions to linear layers, ready to be worn; `_own` makes it of a file."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from phloem.layers.moe import SparseMLP
    from phloem.layers.weight import Weight
    from phloem.layers.worn import WornEmbedding, WornExperts, WornHead


@dataclass(slots=True)
class Own:
    """Of one adapter."""

    slots: list[tuple[Weight, Any]] = field(default_factory=list)  # what stands in place of a weight's value
    embedding: WornEmbedding | None = None
    head: WornHead | None = None
    experts: list[tuple[SparseMLP, WornExperts]] = field(default_factory=list)
    nbytes: int = 0

    @property
    def tokens(self) -> int:
        """Token ids that it knows; 0: those of the base."""
        return 0 if self.embedding is None else self.embedding.rows

    @property
    def empty(self) -> bool:
        return not self.slots and self.embedding is None and self.head is None and not self.experts
