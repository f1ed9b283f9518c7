"""What a reasoning parser is: text in as it arrives; reasoning and content out, apart.

A reasoning block stands at the beginning of an answer. The newlines that formats put around a block's text belong to
neither side. Whether the prompt has opened the block already is told at the start (`opened`).
"""

from __future__ import annotations

from typing import ClassVar

from phloem.text.tools._base import partial_suffix


class ThinkingParser:
    """Base of the formats: a block between two markers.

    Args:
        opened: True: the prompt ends inside a block; False: it ends outside of one; None: not known, then the format
            decides (`always`: its models reason without writing the opening marker).
    """

    start: ClassVar[str] = "<think>"
    end: ClassVar[str] = "</think>"
    always: ClassVar[bool] = False
    # Markers that end the block without its own end, and stay in the content: models jump to a tool call so.
    jumps: ClassVar[tuple[str, ...]] = ()
    # Where answers are messages: what opens a header, the name of the content's, what ends a header. Constraints hold
    # in that message alone. The texts behind these part messages.
    channel: ClassVar[tuple[str, str, str] | None] = None
    between: ClassVar[tuple[str, ...]] = ()

    def __init__(self, opened: bool | None = None) -> None:
        inside = self.always if opened is None else opened
        self._state = "open" if inside else "begin"
        self._may_open = opened is not False or not self.always
        self._buffer = ""

    @property
    def inside(self) -> bool:
        """Whether the text so far ends inside a block."""
        return self._state in ("open", "inside")

    def push(self, text: str) -> tuple[str, str]:
        """Take the next piece; returns new reasoning and new content."""
        return apart(self.pieces(text, False))

    def finish(self) -> tuple[str, str]:
        """The answer has ended: what was held back."""
        return apart(self.pieces("", True))

    def pieces(self, text: str, last: bool) -> list[tuple[bool, str]]:
        """Take the next piece, which may be the last; returns new (whether it is reasoning, text) in their order."""
        self._buffer += text
        reasoning, content = self._read(last)
        return [(known, piece) for known, piece in ((True, reasoning), (False, content)) if piece]

    def parse(self, text: str) -> tuple[str, str]:
        """Reasoning and content of a whole answer (for a fresh parser)."""
        pieces = [self.push(text), self.finish()]
        return "".join(piece[0] for piece in pieces), "".join(piece[1] for piece in pieces)

    def _read(self, last: bool) -> tuple[str, str]:
        reasoning = content = ""
        if self._state == "begin":
            content += self._begin(last)
        if self._state == "open":
            self._open(last)
        if self._state == "inside":
            reasoning = self._inside(last)
        if self._state == "after":
            self._buffer = self._buffer.lstrip("\n")
            self._state = "after" if not self._buffer else "outside"
        if self._state == "outside":
            content += self.outside(last)
        return reasoning, content

    def _begin(self, last: bool) -> str:
        """Nothing is read yet: does a block begin?"""
        body = self._buffer.lstrip()
        if self._may_open and body.startswith(self.start):
            self._buffer = body
            self._state = "open"
        elif last or not (self._may_open and self.start.startswith(body)):
            self._state = "outside"
        return ""

    def _open(self, last: bool) -> None:
        """A block has begun, by the prompt or by the marker that may come now."""
        body = self._buffer.lstrip()
        if body.startswith(self.start):
            self._buffer = body[len(self.start) :]
            self._state = "inside"
            self._lead = True
        elif last or not self.start.startswith(body):
            self._state = "inside"
            self._lead = True

    _lead = False  # newlines at the block's beginning are still to be dropped

    def _inside(self, last: bool) -> str:
        if self._lead:
            self._buffer = self._buffer.lstrip("\n")
            self._lead = not self._buffer
        marks = (self.end, *self.jumps)
        found = [(at, mark) for mark in marks if (at := self._buffer.find(mark)) >= 0]
        if found:
            at, mark = min(found)
            text = self._buffer[:at].rstrip("\n")
            self._buffer = self._buffer[at + len(mark) if mark == self.end else at :]
            self._state = "after" if mark == self.end else "outside"
            return text
        size = len(self._buffer)
        if not last:
            size -= partial_suffix(self._buffer, marks)
            size = len(self._buffer[:size].rstrip("\n"))
        text, self._buffer = self._buffer[:size], self._buffer[size:]
        return text

    def outside(self, last: bool) -> str:
        """Content from the buffer; formats that wrap it override this."""
        text, self._buffer = self._buffer, ""
        return text


def apart(pieces: list[tuple[bool, str]]) -> tuple[str, str]:
    """The reasoning and the content of pieces."""
    return "".join(text for known, text in pieces if known), "".join(text for known, text in pieces if not known)
