"""What a drafter is: one that looks at texts, or a model that is loaded beside the engine's."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from phloem.checkpoint.describe import Checkpoint
    from phloem.core.speculation import Wanted
    from phloem.engine.drafts.drafting import Loaded
    from phloem.layers.context import BuildContext
    from phloem.models import Model
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
    """Where drafts come from. Called in the scheduler's thread alone, so a call must take microseconds.

    `likely(source, sure, matched)`: how often the first of such drafts has been right, for one that has to choose.
    """

    likely: Callable[[str, bool, int], float] | None = None

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


class Loader(ABC):
    """Loads a model that drafts, beside the one that it drafts for. Made before anything is loaded: what it can tell
    from the files' headers it refuses then.

    Raises:
        ConfigError: it does not fit the model.
        ModelLoadError: its checkpoint is missing something or is corrupt.
    """

    shift: int  # 1 where it reads, at a position, the token behind it

    @abstractmethod
    def __init__(self, wanted: Wanted, target: Checkpoint) -> None: ...

    @abstractmethod
    def load(self, model: Model, ctx: BuildContext, positions: int) -> Loaded:
        """Load it, put its memory behind the model's, and have the model keep the states that it reads.

        Args:
            model: the one that it drafts for, with its weights.
            ctx: how that was built.
            positions: of a text, at most.
        """
