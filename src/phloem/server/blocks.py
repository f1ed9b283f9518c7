"""An answer as a row of blocks (reasoning, text, calls), and how it grows: what block-wise protocols stream."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from phloem.client.request import new_id
from phloem.text.answer import Reasoning
from phloem.text.tools._base import CallStart, Text

if TYPE_CHECKING:
    from phloem.text.answer import AnswerEvent

Kind = Literal["reasoning", "text", "call"]


@dataclass(slots=True, eq=False)
class Block:
    """`text` is that of the reasoning or the answer, or a call's arguments (a JSON object)."""

    kind: Kind
    index: int
    id: str  # of this block: new, without a prefix
    text: str = ""
    name: str = ""
    call_id: str = ""
    done: bool = False


@dataclass(frozen=True, slots=True)
class Change:
    """A block opens, has new text, or closes."""

    what: Literal["open", "more", "close"]
    block: Block
    text: str = ""


@dataclass(slots=True)
class Blocks:
    """The blocks of one answer so far. A block opens when the one before it has closed."""

    blocks: list[Block] = field(default_factory=list[Block])

    def push(self, events: list[AnswerEvent]) -> list[Change]:
        """Take the next of what the parser found; what it changes, in order."""
        changes: list[Change] = []
        for event in events:
            if isinstance(event, Reasoning):
                self._more("reasoning", event.text, changes)
            elif isinstance(event, Text):
                self._more("text", event.text, changes)
            elif isinstance(event, CallStart):
                self._open("call", changes, event.name, event.id)
            elif event.text:
                self.blocks[-1].text += event.text
                changes.append(Change("more", self.blocks[-1], event.text))
        return changes

    def finish(self, at_least_text: bool = False) -> list[Change]:
        """The answer has ended. `at_least_text`: an answer without any block gets an empty text."""
        changes: list[Change] = []
        if not self.blocks and at_least_text:
            self._open("text", changes)
        self._close(changes)
        return changes

    def whole(self, events: list[AnswerEvent], at_least_text: bool = False) -> list[Block]:
        """The blocks of an answer that was parsed in one go."""
        self.push(events)
        self.finish(at_least_text)
        return self.blocks

    def _more(self, kind: Kind, text: str, changes: list[Change]) -> None:
        if not self.blocks or self.blocks[-1].done or self.blocks[-1].kind != kind:
            self._open(kind, changes)
        self.blocks[-1].text += text
        changes.append(Change("more", self.blocks[-1], text))

    def _open(self, kind: Kind, changes: list[Change], name: str = "", call_id: str = "") -> Block:
        self._close(changes)
        block = Block(kind, len(self.blocks), new_id(), name=name, call_id=call_id)
        self.blocks.append(block)
        changes.append(Change("open", block))
        return block

    def _close(self, changes: list[Change]) -> None:
        if self.blocks and not self.blocks[-1].done:
            self.blocks[-1].done = True
            changes.append(Change("close", self.blocks[-1]))
