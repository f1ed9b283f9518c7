"""What a request waits for, and what its output keeps to: two things that may come from one hand, as a grammar does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    from phloem.core.batch import Follower
    from phloem.core.errors import PhloemError


class Late(Protocol):
    """Something that a request waits for: a grammar that compiles, pages that are fetched.

    Polled in the scheduler's thread until it is ready once; then it is let go, whatever it says later.
    """

    @property
    def error(self) -> PhloemError | None:
        """Why the request cannot be served; looked at once `ready` is True."""
        ...

    def ready(self) -> bool: ...


class Constraint(Protocol):
    """What the output of one request keeps to. Called in the scheduler's thread, once all that is waited for is ready.

    A request keeps it over preemption: where it stands is said by output tokens, not by slot.
    """

    @property
    def can_jump(self) -> bool:
        """Whether `jump` may ever give tokens."""
        ...

    def follower(self, output: Sequence[int]) -> Follower:
        """For the runner: the request enters a slot, for the first time or again, with this output so far.

        None of its launched steps is uncommitted. The follower given before is not called any more.
        """
        ...

    def jump(self, output: Sequence[int]) -> list[int]:
        """Tokens that are sure to follow the output.

        Raises:
            BadRequest: the request must end: its constraint cannot be kept to.
        """
        ...

    def advance(self, output: Sequence[int]) -> None:
        """The output is now this, with forced tokens in it; no launched step of the request is uncommitted."""
        ...


@dataclass(frozen=True, slots=True)
class Prepared:
    """What a request brings along beside its tokens."""

    waits: tuple[Late, ...] = ()
    constraint: Constraint | None = None
