"""Step caches: where a row's step would say nearly what one before said, most of its blocks are not computed.

Three kinds, by what is compared: what the first block adds (`first_block`) or the first few (`dbcache`, which may
compute the last ones too), below a threshold, with what they added when all was computed last; or (`teacache`) how far
the first block's modulated input has moved since then, summed over steps. The row then takes what the blocks left out
added last. State is each row's own: rows of any kind, and with none, share a pass, and before each block those that
compute are gathered.

Sources: TeaCache, arXiv 2411.19108; DBCache as in cache-dit; first-block decisions are those of
`diffusers.hooks.first_block_cache`.
"""

from __future__ import annotations

import contextlib
import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

from phloem.core.errors import BadRequest

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

    from torch import Tensor

    from phloem.core.caching import StepCaching

    class Row(Protocol):
        """A row of a pass."""

        @property
        def kept(self) -> tuple[Kept, ...]: ...

        @property
        def last(self) -> bool: ...


STATES, TEXTS = "hidden_states", "encoder_hidden_states"
# Arguments of blocks with a row for each.
BY_ROW = (
    *(STATES, TEXTS, "encoder_hidden_states_mask", "temb", "attention_mask", "modulate_index"),
    *("x", "attn_mask", "freqs_cis", "adaln_input"),  # of Z-Image's
)
PLAIN = (0.0, 0.0, 0.0, 1.0, 0.0)  # TeaCache's polynomial where none was fitted: the distance itself


@dataclass(eq=False)
class Kept:
    """What a row keeps between its steps; one for the prompt, one for what guides away from it.

    `signal`: what is compared; `rest`: what the blocks that are left out added when they were computed last, `texts`
    what they added to the texts, for blocks behind them. `moved`: TeaCache's sum; `steps`: done, `idle`: of these the
    last ones that were not computed.
    """

    rule: StepCaching
    signal: Tensor | None = None
    rest: Tensor | None = None
    texts: Tensor | None = None
    moved: float = 0.0
    steps: int = 0
    idle: int = 0


@dataclass
class _Turn:
    """A row's part in one pass; it becomes what is kept once the pass has succeeded."""

    kept: Kept
    ends: bool  # the row's last step
    computes: bool = True
    signal: Tensor | None = None
    moved: float = 0.0
    before: Tensor | None = None  # the states where blocks may be left out
    texts_before: Tensor | None = None
    rest: Tensor | None = None
    texts: Tensor | None = None

    def settle(self) -> None:
        kept = self.kept
        kept.signal = kept.signal if self.signal is None else self.signal
        if self.computes:
            kept.rest, kept.texts = self.rest, self.texts
        kept.moved, kept.steps = self.moved, kept.steps + 1
        kept.idle = 0 if self.computes else kept.idle + 1


class StepCache:
    """Stands between a transformer and its blocks.

    Args:
        transformer: of diffusers.
        lists: the names of its lists of blocks, in the order in which they are run.
        modulated: of the first block and its arguments: its modulated input, a row for each.
        coefficients: TeaCache's polynomial for this family, where there is one.
        states: the argument of a block that the states are.
        states_first: blocks that give texts too give them behind the states.
    """

    def __init__(
        self,
        transformer: Any,
        lists: Sequence[str],
        modulated: Callable[[Any, dict[str, Any]], Tensor],
        coefficients: tuple[float, ...] = PLAIN,
        states: str = STATES,
        states_first: bool = False,
    ) -> None:
        self.blocks: list[Any] = [block for name in lists for block in transformer.get_submodule(name)]
        self.saved = self.asked = 0  # blocks of rows that were not computed, and all
        self.steps = self.idle = 0  # of rows, and those in which blocks were left out
        self._modulated, self._coefficients = modulated, coefficients
        self._states, self._states_first = states, states_first
        self._turns: list[_Turn | None] = []
        self._begun: Tensor | None = None  # the states before the first block
        self._pairs = False  # blocks give texts and states, not states alone
        for at, block in enumerate(self.blocks):
            block.forward = self._wrapped(block.forward, at)

    def check(self, rule: StepCaching) -> None:
        """Raises BadRequest: there is no block that could be left out."""
        if rule.kind == "dbcache" and rule.first + rule.last >= len(self.blocks):
            raise BadRequest(
                f"cache.fn_compute_blocks: this model has {len(self.blocks)} blocks, and {rule.first} first and "
                f"{rule.last} last ones leave none out",
                param="cache.fn_compute_blocks",
            )

    @contextlib.contextmanager
    def rows(self, rows: Sequence[Row], model: int = 0) -> Generator[None]:
        """For one pass of these rows. A pass that fails changes nothing that is kept."""
        self._turns = [_Turn(row.kept[model], row.last) if row.kept else None for row in rows]
        try:
            yield
            turns = [turn for turn in self._turns if turn is not None]
            for turn in turns:
                turn.settle()
            if not turns:
                return
            self.steps += len(rows)
            self.asked += len(rows) * len(self.blocks)
            for turn in turns:
                self.idle += not turn.computes
                self.saved += 0 if turn.computes else self._end(turn) - turn.kept.rule.first
        finally:
            self._turns, self._begun = [], None

    def _end(self, turn: _Turn) -> int:
        """The first of the last blocks."""
        return len(self.blocks) - turn.kept.rule.last

    def _wrapped(self, forward: Any, at: int) -> Any:
        bind = inspect.signature(forward).bind

        def run(*args: Any, **options: Any) -> Any:
            if not any(self._turns):
                return forward(*args, **options)
            given = bind(*args, **options).arguments
            if at == 0:
                self._begun = given[self._states]
            self._decide(at, given)
            made = self._of_rows(forward, given, at)
            self._pairs = isinstance(made, tuple)
            return self._turned(self._ended(made, at + 1))

        return run

    # --- decisions

    def _decide(self, at: int, given: dict[str, Any]) -> None:
        """For the rows whose first blocks end here."""
        modulated: Tensor | None = None
        for place, turn in enumerate(self._turns):
            if turn is None or turn.kept.rule.first != at or at >= self._end(turn):
                continue
            turn.before = given[self._states][place]
            if turn.kept.rule.last and self._pairs:
                turn.texts_before = given[TEXTS][place]
            if turn.kept.rule.kind == "teacache":
                modulated = self._modulated(self.blocks[0], given) if modulated is None else modulated
                self._by_input(turn, modulated[place])
            else:
                assert self._begun is not None and turn.before is not None
                self._by_residual(turn, turn.before - self._begun[place])

    def _by_residual(self, turn: _Turn, added: Tensor) -> None:
        kept, rule = turn.kept, turn.kept.rule
        turn.computes = _must(turn) or kept.signal is None or not _change(added, kept.signal) <= rule.threshold
        turn.signal = added if turn.computes else None

    def _by_input(self, turn: _Turn, signal: Tensor) -> None:
        kept, rule = turn.kept, turn.kept.rule
        if not (turn.ends or kept.signal is None):
            moved = 0.0
            for coefficient in rule.coefficients or self._coefficients:  # by Horner
                moved = moved * _change(signal, kept.signal) + coefficient
            turn.moved = kept.moved + moved
        turn.computes = turn.ends or _must(turn) or not turn.moved < rule.threshold
        turn.moved = 0.0 if turn.computes else turn.moved
        turn.signal = signal

    # --- blocks

    def _of_rows(self, forward: Any, given: dict[str, Any], at: int) -> Any:
        """A block over the rows that compute it; the others pass as they are."""
        computes = [
            place
            for place, turn in enumerate(self._turns)
            if turn is None or turn.computes or at < turn.kept.rule.first or at >= self._end(turn)
        ]
        if len(computes) == len(self._turns):
            return self._turned(forward(**given))
        if not computes:
            return (given[TEXTS], given[self._states]) if self._pairs else given[self._states]
        places = torch.tensor(computes, device=given[self._states].device)
        made = self._turned(forward(**{name: _taken(name, value, places) for name, value in given.items()}))
        if not isinstance(made, tuple):
            return given[self._states].index_copy(0, places, made)
        texts, states = made
        if texts is None:  # the last block of some has no use for them
            return given[TEXTS], given[self._states].index_copy(0, places, states)
        return given[TEXTS].index_copy(0, places, texts), given[self._states].index_copy(0, places, states)

    def _turned(self, made: Any) -> Any:
        """From the order in which this family's blocks give states and texts, and back."""
        return made[::-1] if self._states_first and isinstance(made, tuple) else made

    def _ended(self, made: Any, at: int) -> Any:
        """Behind a block that is the last one left out of some rows: those that were not computed take what was added
        last, of the others it is kept."""
        here = [
            (place, turn)
            for place, turn in enumerate(self._turns)
            if turn is not None and turn.before is not None and self._end(turn) == at
        ]
        if not here:
            return made
        texts, states = made if isinstance(made, tuple) else (None, made)
        if any(not turn.computes for _, turn in here):
            states, texts = states.clone(), None if texts is None else texts.clone()
        for place, turn in here:
            kept, before = turn.kept, turn.before
            assert before is not None
            if turn.computes:
                turn.rest = states[place] - before
                if turn.texts_before is not None and texts is not None:
                    turn.texts = texts[place] - turn.texts_before
            else:
                assert kept.rest is not None
                states[place] = before + kept.rest
                if kept.texts is not None and texts is not None:  # the padding of a text is others', and is not read
                    width = min(kept.texts.shape[0], texts.shape[1])
                    texts[place, :width] += kept.texts[:width]
        return (texts, states) if isinstance(made, tuple) else states


def _must(turn: _Turn) -> bool:
    """Whether a step is computed whatever is compared."""
    kept, rule = turn.kept, turn.kept.rule
    tired = rule.in_a_row > 0 and kept.idle >= rule.in_a_row
    return kept.rest is None or kept.steps < rule.warmup or tired


def _change(now: Tensor, before: Tensor | None) -> float:
    """How far it is from before, in the mean of what it was."""
    assert before is not None
    return float((now - before).abs().mean() / before.abs().mean())


def _taken(name: str, value: Any, places: Tensor) -> Any:
    if isinstance(value, dict):
        return {inner: _taken(inner, one, places) for inner, one in value.items()}
    return value[places] if name in BY_ROW and isinstance(value, torch.Tensor) else value
