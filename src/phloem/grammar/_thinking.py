"""A grammar that begins where a reasoning block ends: until then any token may come, except those that end the text."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from phloem.core.messages import Thinking
    from phloem.grammar._base import Matcher, Vocabulary


_END_TOKENS = 24  # at least as many tokens as an end marker can be split into
OPEN, MAYBE, CLOSED = "open", "maybe", "closed"


class ThinkingMatcher:
    """A matcher around a matcher (see `_base.Matcher`)."""

    def __init__(self, inner: Matcher, thinking: Thinking, vocabulary: Vocabulary) -> None:
        self.inner = inner
        self.thinking = thinking
        self.vocabulary = vocabulary
        self._end_text = thinking.end_text.encode()
        self._first = OPEN if thinking.opened else MAYBE if thinking.start else CLOSED
        self._state = self._first
        self._free: list[int] = []  # tokens before the grammar
        self._bound = 0  # tokens inside the grammar

    def accept(self, ids: Sequence[int]) -> int:
        for count, token in enumerate(ids):
            if self._state == MAYBE and not self._opens(token):
                self._state = CLOSED
            if self._state == CLOSED:
                taken = self.inner.accept(ids[count:])
                self._bound += taken
                return count + taken
            if token in self.vocabulary.eos_ids:
                return count
            self._free.append(int(token))
            self._state = self._after_free()
        return len(ids)

    def rollback(self, count: int) -> None:
        inside = min(count, self._bound)
        self.inner.rollback(inside)
        self._bound -= inside
        free = count - inside
        if free:
            del self._free[-free:]
        if not self._bound:
            self._state = self._after_free()

    def fill(self, mask: NDArray[np.int32]) -> None:
        if self._state == CLOSED:
            self.inner.fill(mask)
            return
        if self._state == OPEN:
            mask[:] = -1
            spare = mask.size * 32 - self.vocabulary.size
            if spare:
                mask[-1] = np.uint32((1 << (32 - spare)) - 1).view(np.int32)
            for token in self.vocabulary.eos_ids:
                clear_bit(mask, token)
            return
        self.inner.fill(mask)
        set_bit(mask, self.thinking.start[len(self._free)])

    def jump(self) -> list[int]:
        return self.inner.jump() if self._state == CLOSED else []

    @property
    def may_end(self) -> bool:
        return self._state == CLOSED and self.inner.may_end

    @property
    def done(self) -> bool:
        return self._state == CLOSED and self.inner.done

    def _opens(self, token: int) -> bool:
        return token == self.thinking.start[len(self._free)]

    def _after_free(self) -> str:
        if self._first == CLOSED:
            return CLOSED
        if self._first == MAYBE and len(self._free) < len(self.thinking.start):
            return MAYBE
        end = self.thinking.end
        if end and self._free[-len(end) :] == end:
            return CLOSED
        # The marker may share its tokens with the text around it; it ends in the last one in any case.
        tail = self.vocabulary.text_of(self._free[-_END_TOKENS:]) if self._end_text else b""
        return CLOSED if self._end_text and self._end_text in tail else OPEN


def set_bit(mask: NDArray[np.int32], token: int) -> None:
    mask.view(np.uint32)[token >> 5] |= np.uint32(1 << (token & 31))


def clear_bit(mask: NDArray[np.int32], token: int) -> None:
    mask.view(np.uint32)[token >> 5] &= np.uint32(0xFFFFFFFF ^ (1 << (token & 31)))
