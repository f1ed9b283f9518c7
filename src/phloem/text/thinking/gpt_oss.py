"""gpt-oss (Harmony): messages on channels. The analysis channel is reasoning, the others are content.

Calls (messages with a recipient) stay in the content as they are written, for the tool-call parser.
"""

from __future__ import annotations

import re

from phloem.text.shown import Shown
from phloem.text.thinking._base import ThinkingParser
from phloem.text.tools._base import partial_suffix

NAMES = ("gptoss", "openai_gptoss")
SHOWN_BY = (
    Shown("<|channel|>analysis"),
    Shown("<|channel|>", "analysis"),
)

START, CHANNEL, MESSAGE = "<|start|>", "<|channel|>", "<|message|>"
ENDS = ("<|end|>", "<|return|>", "<|call|>")
_NAME = re.compile(r"(?:assistant)?\s*(?:to=\S+\s*)?<\|channel\|>\s*(\w+)")
MAX_HEADER = 400


class Parser(ThinkingParser):
    start = "<|channel|>analysis<|message|>"
    end = "<|end|>"
    channel = (CHANNEL, "final", MESSAGE)
    between = (START, *ENDS)

    def __init__(self, opened: bool | None = None) -> None:
        super().__init__(opened)
        self._part = "reasoning" if opened else "between"  # or "content", "call"

    @property
    def inside(self) -> bool:
        return self._part == "reasoning"

    def pieces(self, text: str, last: bool) -> list[tuple[bool, str]]:
        self._buffer += text
        found: list[tuple[bool, str]] = []
        while True:
            before = self._part, len(self._buffer)
            known = self._part == "reasoning"
            piece = self._between(last) if self._part == "between" else self._body(last)
            if piece:
                found.append((known, piece))
            if (self._part, len(self._buffer)) == before or not self._buffer:
                return found

    def _between(self, last: bool) -> str:
        """Outside of a message: a header, or text without any."""
        begins = (START, CHANNEL)
        found = [at for mark in begins if (at := self._buffer.find(mark)) >= 0]
        if not found:
            hold = 0 if last else partial_suffix(self._buffer, begins)
            size = len(self._buffer) - hold
            text, self._buffer = self._buffer[:size], self._buffer[size:]
            return text
        at = min(found)
        text = self._buffer[:at]
        stop = self._buffer.find(MESSAGE, at)
        if not 0 <= stop - at <= MAX_HEADER:
            if last or len(self._buffer) - at > MAX_HEADER + len(MESSAGE):
                at += 2  # no header follows this marker: it is text
            text, self._buffer = self._buffer[:at], self._buffer[at:]
            return text
        header = self._buffer[at : stop + len(MESSAGE)]
        self._buffer = self._buffer[stop + len(MESSAGE) :]
        if "to=" in header:
            self._part = "call"
            return text + header
        channel = _NAME.search(header.removeprefix(START))
        self._part = "reasoning" if channel and channel[1] == "analysis" else "content"
        return text

    def _body(self, last: bool) -> str:
        found = [(at, mark) for mark in (*ENDS, START) if (at := self._buffer.find(mark)) >= 0]
        if not found:
            hold = 0 if last else partial_suffix(self._buffer, (*ENDS, START))
            size = len(self._buffer) - hold
            text, self._buffer = self._buffer[:size], self._buffer[size:]
            return text
        at, mark = min(found)
        behind = at if mark == START else at + len(mark)
        text = self._buffer[: behind if self._part == "call" else at]
        self._buffer = self._buffer[behind:]
        self._part = "between"
        return text
