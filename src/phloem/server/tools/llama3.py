"""Llama 3.1 to 3.3: `{"name": ..., "parameters": {...}}` as the whole answer, several joined by `;`.

A `<|python_tag|>` may stand before it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from phloem.server.tools._base import Ended
from phloem.server.tools._json import JsonReader

if TYPE_CHECKING:
    from phloem.server.tools._base import Steps

TAG = "<|python_tag|>"


class Parser(JsonReader):
    begins = (TAG,)
    lead = "{"

    def section(self, marker: str) -> Steps[None]:
        yield from self.spaces()
        while True:
            yield from self.named_object()
            if not (yield from self._separator()):
                return

    def _separator(self) -> Steps[bool]:
        """`;` and then another call; otherwise the position stays behind the last call."""
        back = self._at
        try:
            yield from self.spaces()
            if (yield from self.accept(";")):
                yield from self.spaces()
                if (yield from self.peek()) == "{":
                    return True
        except Ended:
            pass
        self._at = back
        return False

    def tag(self, name: str) -> tuple[str, str]:
        return f'{{"name": "{name}", "parameters": ', "}"
