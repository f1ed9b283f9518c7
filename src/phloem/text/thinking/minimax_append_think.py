"""MiniMax M2 for clients that part the text themselves: all of it is content, with the opening tag that is missing."""

from __future__ import annotations

from phloem.text.thinking._base import ThinkingParser

NAMES = ("minimax_m2_append_think",)


class Parser(ThinkingParser):
    def __init__(self, opened: bool | None = None) -> None:
        super().__init__(False)
        self._state = "outside"
        self._tag = "" if opened is False else self.start

    def outside(self, last: bool) -> str:
        if self._tag and self._buffer:
            self._buffer, self._tag = self._tag + self._buffer, ""
        return super().outside(last)
