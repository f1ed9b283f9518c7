"""Formats whose content stands in a wrapper behind the reasoning."""

from __future__ import annotations

from typing import ClassVar

from phloem.text.thinking._base import ThinkingParser
from phloem.text.tools._base import partial_suffix


class Wrapped(ThinkingParser):
    """`wraps`: what may stand around the content; neither it nor the newlines just inside are content."""

    wraps: ClassVar[tuple[str, str]]

    def __init__(self, opened: bool | None = None) -> None:
        super().__init__(opened)
        self._wrapper = "may open"

    def outside(self, last: bool) -> str:
        """Content without its wrapper and the newlines just inside it."""
        if self._wrapper == "may open":
            body = self._buffer.lstrip()
            if body.startswith(self.wraps[0]):
                self._buffer, self._wrapper = body[len(self.wraps[0]) :], "opened"
            elif last or not self.wraps[0].startswith(body):
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
        at = self._buffer.find(self.wraps[1])
        if at >= 0:
            text = self._buffer[:at].rstrip("\n")
            rest = self._buffer[at + len(self.wraps[1]) :]
            self._buffer, self._wrapper = "", "closed"
            return text + rest
        size = len(self._buffer)
        if not last:
            size -= partial_suffix(self._buffer, (self.wraps[1],))
            size = len(self._buffer[:size].rstrip("\n"))
        text, self._buffer = self._buffer[:size], self._buffer[size:]
        return text
