"""What a drafter is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from phloem.core.speculation import Wanted
    from phloem.speculation.texts import Text


@dataclass(slots=True)
class Draft:
    """Tokens that may follow a text.

    `source` names where they come from, and `matched` tells how many tokens before them agree with that place: drafts
    of one source and match are accepted about equally often. `sure`: nothing else follows the same tokens elsewhere.
    """

    tokens: list[int]
    source: str
    matched: int = 0
    sure: bool = True


class Drafter(ABC):
    """Where drafts come from. Called in the scheduler's thread alone, so a call must take microseconds."""

    @abstractmethod
    def __init__(self, wanted: Wanted) -> None: ...

    @abstractmethod
    def draft(self, text: Text, room: int) -> Draft | None:
        """Up to `room` tokens that may come next; None where nothing is known of them."""

    @abstractmethod
    def ended(self, text: Text) -> None:
        """The text grows no more."""

    @abstractmethod
    def facts(self) -> dict[str, int]:
        """For people: how much it keeps."""
