"""What follows a constrained request: its follower, in the runner's threads, and its forced tokens, in the scheduler's.

Each has a cursor of its own. They share the compiled grammar and no state, so neither waits for the other.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from phloem.core.errors import BadRequest, PhloemError
from phloem.grammar import _base
from phloem.grammar._thinking import clear_bit

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from phloem.core.request import SamplingParams
    from phloem.grammar._base import Compiled, Matcher, Vocabulary
    from phloem.grammar._thinking import Thinking

MAX_JUMP = 256  # forced tokens at once
_SLOW_MASK = 1.0  # seconds of CPU for a single mask
_SLOW_MEAN = 0.05  # and on average, once there were enough of them
_ENOUGH = 32


class Cursor:
    """A matcher and the tokens it has taken."""

    def __init__(self, matcher: Matcher, eos_ids: Sequence[int]) -> None:
        self.matcher = matcher
        self.taken: list[int] = []
        self._eos_ids = eos_ids
        self._ends = 0  # end-of-text tokens after the first, which a matcher does not take

    def extend(self, ids: Sequence[int]) -> None:
        """
        Raises:
            BadRequest: if the grammar goes over a limit.
            PhloemError: if a token does not fit, which the mask before it should have kept out.
        """
        if not ids:
            return
        taken = self.matcher.accept(ids) if not self._ends else 0
        for token in ids[taken:]:
            if token not in self._eos_ids or not self.matcher.done:
                raise PhloemError(f"token {token} at output position {len(self.taken)} does not fit the grammar")
            self._ends += 1
        self.taken.extend(ids)

    def move_to(self, ids: Sequence[int]) -> None:
        """Be where exactly these output tokens lead, whatever was taken before."""
        same = 0
        for mine, other in zip(self.taken, ids, strict=False):
            if mine != other:
                break
            same += 1
        self.back(len(self.taken) - same)
        self.extend(ids[same:])

    def back(self, count: int) -> None:
        """Forget the last `count` tokens."""
        if count:
            self.matcher.rollback(max(0, count - self._ends))
            self._ends = max(0, self._ends - count)
            del self.taken[-count:]


class Following:
    """Masks for one request, from wherever `move_to` puts it (see `core.batch.Follower`).

    When the text is complete and cannot go on, only end-of-text tokens are allowed: with `ignore_eos` the request
    repeats them up to its length limit. `min_new_tokens` is kept here, as far as the grammar can go on: the runner must
    not forbid those tokens itself (`Admission.eos_ids` is empty).
    """

    def __init__(self, matcher: Callable[[], Matcher], vocabulary: Vocabulary, params: SamplingParams) -> None:
        self._make = matcher
        self._vocabulary = vocabulary
        self._field = _base.name_of(params)
        self._min_new_tokens = params.min_new_tokens
        self._cursor: Cursor | None = None
        self._moved: list[int] | None = None
        self._stuck: tuple[list[int], BadRequest] | None = None  # output that would not go on, and why
        self._buffers: list[NDArray[np.int32]] = []
        self._masks = 0
        self._seconds = 0.0

    def move_to(self, output: Sequence[int]) -> None:
        """The output is now this. Called in the scheduler's thread, with no step of the request in flight."""
        self._moved = list(output)

    def masks(self, sampled: Sequence[int], drafts: Sequence[int]) -> list[NDArray[np.int32] | None]:
        """See `core.batch.Follower`. The arrays, `[mask_words]` int32, are written again by the next call.

        Raises:
            BadRequest: if the grammar gets stuck or goes over a limit: fails this request alone.
            PhloemError: if a sampled token does not fit.
        """
        try:
            return self._found(sampled, drafts)
        except BadRequest as error:
            raise BadRequest(f"{self._field}: {error.message}", param=self._field) from None

    def _found(self, sampled: Sequence[int], drafts: Sequence[int]) -> list[NDArray[np.int32] | None]:
        if self._cursor is None:
            self._cursor = Cursor(self._make(), self._vocabulary.eos_ids)
        cursor = self._cursor
        moved, self._moved = self._moved, None
        if self._stuck is not None:
            output = [*cursor.taken, *sampled] if moved is None else moved
            if output[: len(self._stuck[0])] == self._stuck[0]:
                raise self._stuck[1]  # what was chosen behind that draft had no mask, and need not fit
        start = time.thread_time()
        if moved is not None:
            # No step was in flight when the scheduler moved the request, so `sampled` is part of it.
            cursor.move_to(moved)
        else:
            cursor.extend(sampled)
        found: list[NDArray[np.int32] | None] = [self._mask(cursor, 0)]
        self._count(time.thread_time() - start)
        if drafts:
            self._look_ahead(cursor, drafts, found)
        return found

    def _look_ahead(self, cursor: Cursor, drafts: Sequence[int], found: list[NDArray[np.int32] | None]) -> None:
        """Masks behind drafts, as long as these are allowed; the cursor is where it was when this returns."""
        here, start, self._stuck = len(cursor.taken), time.thread_time(), None
        place = 0
        try:
            for place, token in enumerate(drafts):
                if not _base.allows(self._buffers[place], token):
                    break
                cursor.extend([token])
                found.append(self._mask(cursor, place + 1))
            cursor.back(len(cursor.taken) - here)
        except PhloemError as error:
            # Should that draft be chosen, the next call raises this. A matcher that is stuck cannot go back.
            if isinstance(error, BadRequest):
                self._stuck = [*cursor.taken[:here], *drafts[: place + 1]], error
            self._cursor = Cursor(self._make(), self._vocabulary.eos_ids)
            self._cursor.extend(cursor.taken[:here])
        self._count((time.thread_time() - start) / len(drafts))

    def _mask(self, cursor: Cursor, place: int) -> NDArray[np.int32]:
        if place == len(self._buffers):
            self._buffers.append(self._vocabulary.new_mask())
        mask = self._buffers[place]
        cursor.matcher.fill(mask)
        if not mask.any():
            raise BadRequest("the grammar admits no text that goes on from here")
        if len(cursor.taken) < self._min_new_tokens:
            kept = mask.copy()
            for token in self._vocabulary.eos_ids:
                clear_bit(mask, token)
            if not mask.any():
                mask[:] = kept
        return mask

    def _count(self, seconds: float) -> None:
        self._masks += 1
        self._seconds += seconds
        slow = self._masks >= _ENOUGH and self._seconds / self._masks > _SLOW_MEAN
        if seconds > _SLOW_MASK or slow:
            raise BadRequest("the grammar is too slow to follow: simplify it")


class Constrained:
    """A constrained request as the scheduler sees it (see `core.late.Constraint`), once its grammar is compiled.

    `compiled` gives the grammar, or raises why there is none. A request keeps this over preemption: state is by output
    tokens, not by slot.
    """

    def __init__(
        self,
        compiled: Callable[[], Compiled],
        vocabulary: Callable[[], Vocabulary],
        params: SamplingParams,
        jump: bool,
        thinking: Thinking | None,
    ) -> None:
        self._compiled = compiled
        self._vocabulary = vocabulary
        self._params = params
        self._field = _base.name_of(params)
        self._thinking = thinking
        self.can_jump = jump
        self._jumper: Cursor | None = None
        self._following: Following | None = None

    def follower(self, output: Sequence[int]) -> Following:
        """For the runner: the request enters a slot, for the first time or again, with this output."""
        if self._following is None:
            self._following = Following(self._matcher, self._vocabulary(), self._params)
        self._following.move_to(output)
        return self._following

    def advance(self, output: Sequence[int]) -> None:
        """The output is now this, forced tokens included, and no launched step of the request is uncommitted."""
        if self._following is not None:
            self._following.move_to(output)

    def jump(self, output: Sequence[int]) -> list[int]:
        """Tokens that must follow `output`, an end-of-text token included where the text is complete.

        Appended to the output as known and not computed, they are prefilled in one step; tell `advance` then.
        Called in the scheduler's thread. Empty where nothing is forced, and always with `can_jump` False.

        Raises:
            BadRequest: if the grammar gets stuck or goes over a limit.
        """
        try:
            return self._jump(output)
        except BadRequest as error:
            raise BadRequest(f"{self._field}: {error.message}", param=self._field) from None

    def _jump(self, output: Sequence[int]) -> list[int]:
        if not self.can_jump:
            return []
        vocabulary = self._vocabulary()
        if self._jumper is None:
            self._jumper = Cursor(self._matcher(), vocabulary.eos_ids)
        cursor = self._jumper
        try:
            cursor.move_to(output)
        except PhloemError:
            return []  # the follower reports it
        room = MAX_JUMP
        if self._params.max_new_tokens is not None:
            room = min(room, self._params.max_new_tokens - len(output))
        if room <= 0 or (cursor.taken and cursor.taken[-1] in vocabulary.eos_ids):
            return []
        forced = cursor.matcher.jump()[:room]
        cursor.extend(forced)
        enough = len(cursor.taken) >= self._params.min_new_tokens
        if cursor.matcher.done and len(forced) < room and enough and not self._params.ignore_eos:
            forced = [*forced, vocabulary.eos_ids[0]]
        return forced

    def _matcher(self) -> Matcher:
        matcher = self._compiled().matcher()
        return matcher if self._thinking is None else self._thinking.around(matcher, self._vocabulary())
