"""A grammar that begins where a reasoning block ends: until then any token may come, except those that end the text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from phloem.grammar._base import Matcher, Vocabulary


@dataclass(frozen=True)
class Channel:
    """For formats whose answers are messages: the content is the message with the header `name`.

    `opens` begins a header, `closes` ends it; one of `between` behind that means that the message is over.
    """

    opens: int
    name: str
    closes: int
    between: frozenset[int] = frozenset()


@dataclass(frozen=True)
class ThinkingMarkers:
    """Token ids that open and close a block. An empty `start` means that a model may close one but never opens it.

    `always`: an answer begins inside the block, though neither prompt nor answer opens it. `end_text`: the end as text,
    for a tokenizer that splits the marker, and that may split it in another way where other text stands beside it.
    `jumps` end a block without its own end where the grammar takes them. `channel`: all before that message is free.
    """

    start: tuple[int, ...]
    end: tuple[int, ...]
    always: bool = False
    end_text: str = ""
    jumps: tuple[tuple[int, ...], ...] = ()
    channel: Channel | None = None


_HEADER_TOKENS = 40
_END_TOKENS = 24  # at least as many as an end marker is ever split into
OPEN, MAYBE, CLOSED = "open", "maybe", "closed"


def last_header(ids: Sequence[int], channel: Channel) -> list[int]:
    """The header of the message that these tokens end in, its marks included; empty where they end between messages."""
    for close in range(len(ids) - 1, -1, -1):
        if ids[close] in channel.between or ids[close] == channel.opens:
            return []
        if ids[close] == channel.closes:
            for place in range(close - 1, max(-1, close - 1 - _HEADER_TOKENS), -1):
                if ids[place] == channel.opens:
                    return list(ids[place : close + 1])
                if ids[place] == channel.closes or ids[place] in channel.between:
                    return []
            return []
    return []


def is_content(header: Sequence[int], channel: Channel, vocabulary: Vocabulary) -> bool:
    """Whether this is the header of the content's message."""
    words = vocabulary.text_of(header).split()
    return bool(words) and words[0] == channel.name.encode()


def state_after(prompt: Sequence[int], markers: ThinkingMarkers) -> str:
    """Whether the prompt leaves a block open, has closed it, or lets the model open one.

    Not for formats with a `channel`: there `last_header` says it.
    """
    start, end = _last(prompt, markers.start), _last(prompt, markers.end)
    if start > end:
        return OPEN
    # A closed block counts only at the very end: those of earlier turns say nothing of this one.
    closed_here = end >= 0 and len(prompt) - (end + len(markers.end)) <= 2
    if markers.always and not closed_here:
        return OPEN
    return CLOSED if closed_here or not markers.start else MAYBE


def _last(ids: Sequence[int], marker: tuple[int, ...]) -> int:
    width = len(marker)
    if not width:
        return -1
    for place in range(len(ids) - width, -1, -1):
        if tuple(ids[place : place + width]) == marker:
            return place
    return -1


@dataclass(frozen=True)
class Thinking:
    """Where a prompt ends with regard to reasoning: whether a grammar must wait for the end of a block."""

    markers: ThinkingMarkers
    state: str
    header: tuple[int, ...] = ()  # of the message that the prompt ends in, where answers are messages

    @staticmethod
    def of(prompt: Sequence[int], markers: ThinkingMarkers) -> Thinking:
        header = last_header(prompt, markers.channel) if markers.channel is not None else []
        return Thinking(markers, state_after(prompt, markers), tuple(header))

    def around(self, matcher: Matcher, vocabulary: Vocabulary) -> Matcher:
        """The matcher, behind one that waits where it must be waited."""
        state, channel = self.state, self.markers.channel
        if channel is not None:
            state = CLOSED if is_content(self.header, channel, vocabulary) else OPEN
        return matcher if state == CLOSED else ThinkingMatcher(matcher, self.markers, state, vocabulary)


class ThinkingMatcher:
    """A matcher around a matcher (see `_base.Matcher`)."""

    def __init__(self, inner: Matcher, markers: ThinkingMarkers, state: str, vocabulary: Vocabulary) -> None:
        self.inner = inner
        self.markers = markers
        self.vocabulary = vocabulary
        self._first = state
        self._state = state
        self._free: list[int] = []  # tokens before the grammar
        self._bound = 0  # tokens inside the grammar
        self._jump: tuple[int, ...] = ()  # of these, the marker that ended the block
        self._begun = 0  # of these, what could have become the marker that opens one

    def accept(self, ids: Sequence[int]) -> int:
        for count, token in enumerate(ids):
            if self._state == MAYBE and not self._opens(token):
                if not self._is_grammars():
                    return count
                self._state, self._begun, self._bound, self._free = CLOSED, len(self._free), len(self._free), []
            if self._state == CLOSED:
                taken = self.inner.accept(ids[count:])
                self._bound += taken
                return count + taken
            if token in self.vocabulary.eos_ids:
                return count
            self._free.append(int(token))
            self._state = self._after_free()
            if self._state == OPEN:
                self._try_jump()
        return len(ids)

    def rollback(self, count: int) -> None:
        inside = min(count, self._bound)
        self.inner.rollback(inside)
        self._bound -= inside
        if self._bound < len(self._jump):  # the rest of the marker is free text again
            self.inner.rollback(self._bound)
            self._free += self._jump[: self._bound]
            self._bound, self._jump = 0, ()
        if self._begun and self._bound <= self._begun:  # these may become the marker again
            self.inner.rollback(self._bound)
            self._free = list(self.markers.start[: self._bound])
            self._bound = self._begun = 0
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
        if self._is_grammars():
            self.inner.fill(mask)
            self.inner.rollback(len(self._free))
        else:
            mask[:] = 0
        set_bit(mask, self.markers.start[len(self._free)])

    def jump(self) -> list[int]:
        return self.inner.jump() if self._state == CLOSED else []

    @property
    def may_end(self) -> bool:
        return self._state == CLOSED and self.inner.may_end

    @property
    def done(self) -> bool:
        return self._state == CLOSED and self.inner.done

    def _is_grammars(self) -> bool:
        """Whether what could become an opening marker may begin the grammar's text too, which then has it."""
        taken = self.inner.accept(self._free)
        if taken < len(self._free):
            self.inner.rollback(taken)
        return taken == len(self._free)

    def _opens(self, token: int) -> bool:
        return token == self.markers.start[len(self._free)]

    def _try_jump(self) -> None:
        for jump in self.markers.jumps:
            if tuple(self._free[-len(jump) :]) != jump:
                continue
            taken = self.inner.accept(jump)
            if taken == len(jump):
                del self._free[-len(jump) :]
                self._bound, self._jump, self._state = taken, jump, CLOSED
                return
            self.inner.rollback(taken)

    def _after_free(self) -> str:
        if self._first == CLOSED:
            return CLOSED
        if self.markers.channel is not None:
            channel = self.markers.channel
            ended = self._free[-1:] == [channel.closes]
            header = last_header(self._free[-_HEADER_TOKENS - 2 :], channel) if ended else []
            return CLOSED if is_content(header, channel, self.vocabulary) else OPEN
        end = self.markers.end
        if self._first == MAYBE and len(self._free) < len(self.markers.start):
            return MAYBE
        if end and tuple(self._free[-len(end) :]) == end:
            return CLOSED
        wanted = self.markers.end_text.encode()
        return CLOSED if wanted and wanted in self.vocabulary.text_of(self._free[-_END_TOKENS:]) else OPEN


def set_bit(mask: NDArray[np.int32], token: int) -> None:
    mask.view(np.uint32)[token >> 5] |= np.uint32(1 << (token & 31))


def clear_bit(mask: NDArray[np.int32], token: int) -> None:
    mask.view(np.uint32)[token >> 5] &= np.uint32(0xFFFFFFFF ^ (1 << (token & 31)))
