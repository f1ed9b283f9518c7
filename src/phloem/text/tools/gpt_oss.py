"""gpt-oss (Harmony): a message on the commentary channel whose recipient is a function.

`<|channel|>commentary to=functions.f <|constrain|>json<|message|>{...}<|call|>`; the recipient may also stand in the
role (`<|start|>assistant to=functions.f<|channel|>commentary json<|message|>`).
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from phloem.text.shown import Shown
from phloem.text.tools._base import Malformed
from phloem.text.tools._grammar import Shape, either, literal, optional, sequence, star, tag, text
from phloem.text.tools._json import JsonReader

if TYPE_CHECKING:
    from collections.abc import Iterable

    from phloem.text.tools._base import Steps

NAMES = ("gptoss", "openai")
SHOWN_BY = (
    Shown("<|channel|>commentary"),
    Shown("<|channel|>", "to=functions."),
)

CHANNEL, START, MESSAGE, CALL = "<|channel|>", "<|start|>assistant", "<|message|>", "<|call|>"
MESSAGE_END, RECIPIENT, FINAL = "<|end|>", "to=functions.", "final"
_HEADER = re.compile(
    r"(?:\s*to=functions\.(?P<role>[\w.\-]+)\s*<\|channel\|>|(?:<\|channel\|>)?)\s*(?:commentary|analysis)"
    r"(?:\s+to=functions\.(?P<channel>[\w.\-]+))?\s*(?:<\|constrain\|>)?\s*(?:json|code)?\s*"
)


class Parser(JsonReader):
    begins = (START, CHANNEL)
    whole = True

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

    def structure(self, names: Iterable[str] | None = None, required: bool = False, parallel: bool = True) -> Shape:
        """Messages up to a call, which ends the answer. Where none must come, a message may end it, too."""
        made, again = self._calls_of(names), tag("", text(), f"{MESSAGE_END}{START}")
        header = literal(f"{CHANNEL}final <|constrain|>json{MESSAGE}")
        if required:
            channels = either(literal(f"{CHANNEL}{name}{MESSAGE}") for name in ("analysis", "commentary"))
            return sequence(star(sequence(channels, again)), either(made))
        # A call's recipient in another place than the one that is enforced would escape its schema.
        channels = either([tag(CHANNEL, text([RECIPIENT]), MESSAGE), header])
        continued = optional(again)  # the prompt may end inside a message
        last = [sequence(channels, text()), text([RECIPIENT])]
        return sequence(continued, star(sequence(channels, again)), either([*made, *last]))

    def instead(self, answer: Shape, names: Iterable[str] | None = None, parallel: bool = True) -> Shape:
        """Messages up to a call, or to one on the final channel, which is the answer."""
        again = tag("", text(), f"{MESSAGE_END}{START}")
        channels = tag(CHANNEL, text([RECIPIENT, FINAL]), MESSAGE)
        header = sequence(literal(f"{CHANNEL}{FINAL}"), optional(literal(" <|constrain|>json")), literal(MESSAGE))
        last = [*self._calls_of(names), sequence(header, answer)]
        return sequence(optional(again), star(sequence(channels, again)), either(last))

    def _calls_of(self, names: Iterable[str] | None) -> list[Shape]:
        frames = [(self.tag(name), self.written(name)) for name in self.chosen(names)]
        return [tag(begin, arguments, end) for (begin, end), arguments in frames]

    def tag(self, name: str) -> tuple[str, str]:
        return f"<|channel|>commentary to=functions.{name} <|constrain|>json{MESSAGE}", CALL
