"""gpt-oss (Harmony): a message on the commentary channel whose recipient is a function.

`<|channel|>commentary to=functions.f <|constrain|>json<|message|>{...}<|call|>`; the recipient may also stand in the
role (`<|start|>assistant to=functions.f<|channel|>commentary json<|message|>`).
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from phloem.server.tools._base import Malformed
from phloem.server.tools._json import JsonReader

if TYPE_CHECKING:
    from phloem.server.tools._base import Steps

CHANNEL, START, MESSAGE, CALL = "<|channel|>", "<|start|>assistant", "<|message|>", "<|call|>"
_HEADER = re.compile(
    r"(?:\s*to=functions\.(?P<role>[\w.\-]+)\s*<\|channel\|>|(?:<\|channel\|>)?)\s*(?:commentary|analysis)"
    r"(?:\s+to=functions\.(?P<channel>[\w.\-]+))?\s*(?:<\|constrain\|>)?\s*(?:json|code)?\s*"
)


class Parser(JsonReader):
    begins = (START, CHANNEL)
    trigger = "<|channel|>commentary"

    def section(self, marker: str) -> Steps[None]:
        header, _ = yield from self.until(MESSAGE, limit=400)
        if START in header:
            raise Malformed  # a message without a body: its successor may be the call
        found = _HEADER.fullmatch(header if marker == START else CHANNEL + header)
        name = (found["role"] or found["channel"]) if found else None
        if name is None:
            raise Malformed
        call = self.begin_call(name)
        yield from self.spaces()
        yield from self.arguments(call)
        call.end()
        yield from self.optional(CALL)

    def tag(self, name: str) -> tuple[str, str]:
        return f"<|channel|>commentary to=functions.{name} <|constrain|>json{MESSAGE}", CALL
