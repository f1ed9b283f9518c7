"""How many different adapters a step may have beside one another, where that is fewer than its rows could have."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from phloem.scheduler.state import Request, Slots

PATIENCE = 256  # times that a request is passed over until nobody behind it enters


class Mixture:
    """Which requests may enter beside the running ones."""

    def __init__(self, slots: Slots, most: int) -> None:
        self._slots, self._most = slots, most
        self._inside: set[int] = set()

    def begin(self) -> None:
        """A step is planned."""
        self._inside = set(self._slots.adapter.tolist()) - {0}

    def full_for(self, request: Request) -> bool:
        """Whether it must wait until fewer adapters are in use; else its adapter counts from here on."""
        if request.adapter is None:
            return False
        entry = request.adapter.entry
        if entry not in self._inside and len(self._inside) >= self._most:
            request.held_back += 1
            return True
        self._inside.add(entry)
        return False

    def out_of_patience(self, request: Request) -> bool:
        """Whether those behind it must wait too, or it would never run."""
        return request.held_back > PATIENCE
