"""ERNIE 4.5 (thinking): an answer begins inside the block; the content may be wrapped in `<response>` tags."""

from __future__ import annotations

from phloem.text.shown import Shown
from phloem.text.thinking._base import ThinkingParser
from phloem.text.tools._base import partial_suffix

NAMES = ("ernie",)
SHOWN_BY = (Shown("<response>", "think>"),)
BEFORE = ("qwen3",)

RESPONSE, RESPONSE_END = "<response>", "</response>"


class Parser(ThinkingParser):
    always = True
    jumps = ("<tool_call>",)

    def __init__(self, opened: bool | None = None) -> None:
        super().__init__(opened)
        self._wrapper = "may open"

    def outside(self, last: bool) -> str:
        """Content without its wrapper and the newlines just inside it."""
        if self._wrapper == "may open":
            body = self._buffer.lstrip()
            if body.startswith(RESPONSE):
                self._buffer, self._wrapper = body[len(RESPONSE) :], "opened"
            elif last or not RESPONSE.startswith(body):
                self._wrapper = "none"
            else:
                return ""
        if self._wrapper == "opened":
            self._buffer = self._buffer.lstrip("\n")
            if self._buffer:
                self._wrapper = "inside"
        if self._wrapper == "inside":
            return self._wrapped(last)
        return "" if self._wrapper == "opened" else super().outside(last)

    def _wrapped(self, last: bool) -> str:
        at = self._buffer.find(RESPONSE_END)
        if at >= 0:
            text = self._buffer[:at].rstrip("\n")
            rest = self._buffer[at + len(RESPONSE_END) :]
            self._buffer, self._wrapper = "", "closed"
            return text + rest
        size = len(self._buffer)
        if not last:
            size -= partial_suffix(self._buffer, (RESPONSE_END,))
            size = len(self._buffer[:size].rstrip("\n"))
        text, self._buffer = self._buffer[:size], self._buffer[size:]
        return text
