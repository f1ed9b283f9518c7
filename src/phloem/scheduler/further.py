"""What the scheduler asks of cache tiers beyond the pool (`kvcache/tiers/`). It knows no more of them.

A page that a tier has is copied into a page of the request's own, in front of the step that first reads it: from then
on it is as if the request had computed it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Collection

    import numpy as np
    from numpy.typing import NDArray

    from phloem.core.batch import Pending
    from phloem.core.late import Late
    from phloem.kvcache.node import Node
    from phloem.kvcache.tiers._fetch import Claim


class Further(Protocol):
    """Called in the scheduler's thread."""

    def fetch(self, request_id: str, namespace: str, tokens: NDArray[np.int32], limit: int) -> Late | None:
        """A request comes in, before any other call for it: begin to fetch what a store has of its first `limit` tokens
        behind what is at hand. None: nothing. What was kept for an earlier one of the same name is forgotten."""
        ...

    def at_hand(self, request_id: str, namespace: str, tokens: NDArray[np.int32], start: int, limit: int) -> int:
        """How many pages from page `start` on can be claimed now, within the first `limit` tokens."""
        ...

    def claim(
        self, request_id: str, namespace: str, tokens: NDArray[np.int32], start: int, limit: int
    ) -> Claim | None: ...

    def give_up(self, claim: Claim) -> None:
        """The request found no room."""
        ...

    def restore(self, claim: Claim, pages: NDArray[np.int32], state: int = 0) -> None:
        """Copy what was claimed to these pages, int32 [groups, n], and its state, if it has one, to this slot, in front
        of the step that is launched next."""
        ...

    def launching(self) -> Pending[None] | None:
        """A step is about to be launched: what is to be copied for it, if anything."""
        ...

    def admitted(self, request_id: str, node: Node) -> None:
        """A request has entered a slot; `node`: where its cached prefix ends."""
        ...

    def turn(self, horizon: int | None, live: Collection[str]) -> None:
        """Once a turn of the loop. What is in the tree since before `horizon` has been computed; None: all of it.
        `live`: requests that have not ended."""
        ...

    def flush(self) -> None:
        """Forget what is in host memory."""
        ...

    def clear_storage(self) -> Pending[int]:
        """Forget what the store has; gives how many pages that were. Raises BadRequest where there is no store."""
        ...

    def stats(self) -> dict[str, float]: ...

    def state(self) -> dict[str, Any]: ...

    def finish(self) -> None:
        """The engine is about to stop: what is on its way to a store arrives, if that takes no more than seconds."""
        ...
