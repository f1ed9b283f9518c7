"""First-block caching: where a row's first block says nearly what it said before, the others are not asked again.

What the first block adds to a row is compared with what it added when the rest was computed last; below a threshold the
row takes what the rest added then. State is each row's own, so rows that compute and rows that do not share a pass:
after the first block those that compute are gathered. Decisions are those of `diffusers.hooks.first_block_cache`.
"""

from __future__ import annotations

import contextlib
import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

    from torch import Tensor

    class Row(Protocol):
        """A row of a pass."""

        @property
        def kept(self) -> tuple[Kept, ...]: ...


STATES, TEXTS = "hidden_states", "encoder_hidden_states"
# Arguments of blocks with a row for each.
BY_ROW = (STATES, TEXTS, "encoder_hidden_states_mask", "temb", "attention_mask", "modulate_index")


@dataclass(eq=False)
class Kept:
    """What a row's blocks added, when all were computed last; one for the prompt, one for what guides away from it.

    `first`: the first block; `rest`: all others. None before the first step.
    """

    threshold: float
    first: Tensor | None = None
    rest: Tensor | None = None


class StepCache:
    """Stands between a transformer and its blocks.

    Args:
        transformer: of diffusers.
        lists: the names of its lists of blocks, in the order in which they are run.
    """

    def __init__(self, transformer: Any, lists: Sequence[str]) -> None:
        self.blocks: list[Any] = [block for name in lists for block in transformer.get_submodule(name)]
        self.saved = self.asked = 0  # blocks of rows that were not computed, and all
        self._kept: list[Kept | None] = []
        self._computes: list[int] = []  # rows whose blocks are all computed in this pass
        self._pairs = False  # blocks give texts and states, not states alone
        self._first: Tensor | None = None  # the states behind the first block
        self._fresh: dict[int, tuple[Tensor, Tensor]] = {}
        for at, block in enumerate(self.blocks):
            block.forward = self._wrapped(block.forward, at)

    @contextlib.contextmanager
    def rows(self, rows: Sequence[Row], model: int = 0) -> Generator[None]:
        """For one pass of these rows. A pass that fails changes nothing that is kept."""
        self._kept = [row.kept[model] if row.kept else None for row in rows]
        self._fresh = {}
        try:
            yield
            if not any(self._kept):
                return
            for at, (first, rest) in self._fresh.items():
                kept = self._kept[at]
                if kept is not None:
                    kept.first, kept.rest = first, rest
            self.asked += len(rows) * len(self.blocks)
            self.saved += (len(rows) - len(self._computes)) * (len(self.blocks) - 1)
        finally:
            self._kept, self._fresh, self._first = [], {}, None

    def _wrapped(self, forward: Any, at: int) -> Any:
        bind = inspect.signature(forward).bind

        def run(*args: Any, **options: Any) -> Any:
            if not any(self._kept):
                return forward(*args, **options)
            given = bind(*args, **options).arguments
            made = forward(**given) if at == 0 else self._of_rows(forward, given)
            if at == 0:
                self._pairs = isinstance(made, tuple)
                self._decide(given[STATES], _states(made))
            return self._ended(made) if at == len(self.blocks) - 1 else made

        return run

    def _decide(self, before: Tensor, after: Tensor) -> None:
        self._first, added = after, after - before
        self._computes = []
        for at, kept in enumerate(self._kept):
            if kept is None or kept.first is None or kept.rest is None or _far(added[at], kept.first, kept.threshold):
                self._computes.append(at)
                self._fresh[at] = (added[at], after[at])  # the second until the last block has its states

    def _of_rows(self, forward: Any, given: dict[str, Any]) -> Any:
        """A block over the rows that compute; the others pass as they are."""
        count = len(self._kept)
        if len(self._computes) == count:
            return forward(**given)
        if not self._computes:
            return (given[TEXTS], given[STATES]) if self._pairs else given[STATES]
        places = torch.tensor(self._computes, device=given[STATES].device)
        made = forward(**{name: _taken(name, value, places) for name, value in given.items()})
        if not isinstance(made, tuple):
            return given[STATES].index_copy(0, places, made)
        texts, states = made
        if texts is None:  # the last block of some has no use for them
            return given[TEXTS], given[STATES].index_copy(0, places, states)
        return given[TEXTS].index_copy(0, places, texts), given[STATES].index_copy(0, places, states)

    def _ended(self, made: Any) -> Any:
        """Behind the last block: rows that were not computed take what was added then."""
        assert self._first is not None
        states = _states(made)
        skipped = [at for at in range(len(self._kept)) if at not in self._fresh]
        if skipped:
            states = states.clone()
            for at in skipped:
                kept = self._kept[at]
                assert kept is not None and kept.rest is not None
                states[at] = self._first[at] + kept.rest
        for at, (added, _) in list(self._fresh.items()):
            self._fresh[at] = (added, states[at] - self._first[at])
        return (made[0], states) if isinstance(made, tuple) else states


def _states(made: Any) -> Tensor:
    return made[1] if isinstance(made, tuple) else made


def _far(added: Tensor, before: Tensor, threshold: float) -> bool:
    """Whether it differs from before by more, in the mean; NaN does."""
    change = (added - before).abs().mean() / before.abs().mean()
    return not bool(change <= threshold)


def _taken(name: str, value: Any, places: Tensor) -> Any:
    if isinstance(value, dict):
        return {inner: _taken(inner, one, places) for inner, one in value.items()}
    return value[places] if name in BY_ROW and isinstance(value, torch.Tensor) else value
