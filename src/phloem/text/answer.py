"""What a model's text means: its reasoning, plain text and tool calls, as a row of events."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from phloem.text.formats import THINKING
from phloem.text.tools._base import Arguments, CallStart, Text

if TYPE_CHECKING:
    from phloem.text.thinking._base import ThinkingParser
    from phloem.text.tokenizer import Tokenizer
    from phloem.text.tools._base import Event, ToolParser


@dataclass(frozen=True, slots=True)
class Reasoning:
    """Text of a reasoning block."""

    text: str


AnswerEvent = Reasoning | Text | CallStart | Arguments


class AnswerParser(Protocol):
    """One continuation's parser. `push` gets each text delta once, in order; `last` with the final one.

    `cut`: the answer has ended, and not because the model ended it.
    """

    def push(self, text: str, last: bool, cut: bool = False) -> list[AnswerEvent]: ...


class PlainAnswer:
    """All of the text is content."""

    def push(self, text: str, last: bool, cut: bool = False) -> list[AnswerEvent]:
        return [Text(text)] if text else []


class FormattedAnswer:
    """Reasoning first, tool calls in what is left.

    Args:
        stream_reasoning: False: the reasoning comes in one piece when its block has ended.
        parallel: False: calls after the first are left out.
    """

    def __init__(
        self,
        thinking: ThinkingParser | None,
        tools: ToolParser | None,
        stream_reasoning: bool = True,
        parallel: bool = True,
    ) -> None:
        self._thinking = thinking
        self._tools = tools
        self._stream_reasoning = stream_reasoning
        self._parallel = parallel
        self._reasoning = ""

    def push(self, text: str, last: bool, cut: bool = False) -> list[AnswerEvent]:
        pieces = self._thinking.pieces(text, last) if self._thinking is not None else [(False, text)]
        found: list[AnswerEvent] = []
        for known, piece in pieces:
            if known and self._stream_reasoning:
                found.append(Reasoning(piece))
            elif known:
                self._reasoning += piece
            elif self._tools is not None:
                found += [*self._gathered(), *self._shown(self._tools.push(piece))]
            elif piece:
                found += [*self._gathered(), Text(piece)]
        if last or (self._thinking is not None and not self._thinking.inside):
            found += self._gathered()
        if last and self._tools is not None:
            found += self._shown(self._tools.finish(cut))
        return found

    def _gathered(self) -> list[AnswerEvent]:
        """Reasoning that was kept back."""
        whole, self._reasoning = self._reasoning, ""
        return [Reasoning(whole)] if whole else []

    def _shown(self, events: Iterable[Event]) -> list[Event]:
        return [event for event in events if isinstance(event, Text) or self._parallel or event.index == 0]


def thinking_parser(name: str | None, prompt: str, continued: str | None = None) -> ThinkingParser | None:
    """A reasoning parser that knows whether the prompt ends inside a block.

    `name` is the format's (None: not parted); `continued` is the answer as the prompt begins it.
    """
    if name is None:
        return None
    kind = THINKING.get(name)
    state = continued_state(continued, kind.start, kind.end) if continued is not None else None
    return kind(state if state is not None else block_state(prompt, kind.start, kind.end))


def block_state(prompt: str, start: str, end: str) -> bool | None:
    """True: the prompt leaves a block open; False: it has just closed one; None: it says nothing."""
    tail = prompt.rstrip()
    if tail.endswith(start):
        return True
    if tail.endswith(end):
        return False
    return None


def continued_state(text: str, start: str, end: str) -> bool | None:
    """As `block_state`, for an answer that is being continued."""
    opened, closed = text.rfind(start), text.rfind(end)
    if opened < 0 and closed < 0:
        return None
    return opened > closed


def needs_special_tokens(tokenizer: Tokenizer | None, tools: ToolParser | None, reasoning: str | None) -> bool:
    """Whether the formats are marked by special tokens, which must then not be left out of the text."""
    if tokenizer is None:
        return False
    markers: set[str] = set()
    if tools is not None:
        markers.update(tools.begins)
    if reasoning is not None:
        kind = THINKING.get(reasoning)
        markers.update((kind.start, kind.end, *kind.jumps))
    return any(_is_special(tokenizer, marker) for marker in markers)


def _is_special(tokenizer: Tokenizer, marker: str) -> bool:
    return any(tokenizer.is_special(token) for token in tokenizer.encode(marker, add_special_tokens=False))
