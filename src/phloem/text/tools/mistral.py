"""Mistral: `[TOOL_CALLS][{"name": ..., "arguments": {...}}, ...]`, and since version 11 of its tokenizer
`[TOOL_CALLS]name[CALL_ID]id[ARGS]{...}` once per call (the id is optional).
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from phloem.text.shown import Shown
from phloem.text.tools._base import MAX_NAME, Malformed
from phloem.text.tools._grammar import Shape, calls, tag
from phloem.text.tools._json import JsonReader

if TYPE_CHECKING:
    from phloem.text.tools._base import Steps

SHOWN_BY = (Shown("[TOOL_CALLS]"),)
BEFORE = ("hermes",)

BEGIN, ID, ARGUMENTS = "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"


def short_id() -> str:
    """Mistral's templates ask for ids of nine letters and digits."""
    return "".join(random.choices(string.ascii_letters + string.digits, k=9))


class Parser(JsonReader):
    begins = (BEGIN,)
    trigger = BEGIN
    between = ""

    def __init__(self, tools: Iterable[dict[str, Any]] = (), make_id: Callable[[], str] = short_id) -> None:
        super().__init__(tools, make_id)

    def section(self, marker: str) -> Steps[None]:
        yield from self.spaces()
        if (yield from self.peek()) == "[":
            yield from self.named_objects()
        else:
            yield from self._named()

    def _named(self) -> Steps[None]:
        name, end = yield from self.until(ID, ARGUMENTS, "{", limit=MAX_NAME)
        call_id = None
        if end == ID:
            call_id, end = yield from self.until(ARGUMENTS, limit=MAX_NAME)
        if end == "{":
            self._at -= 1
        if not name.strip() or any(char.isspace() for char in name.strip()):
            raise Malformed
        call = self.begin_call(name.strip(), call_id)
        yield from self.spaces()
        yield from self.arguments(call)
        call.end()

    def structure(self, names: Iterable[str] | None = None, required: bool = False, parallel: bool = True) -> Shape:
        chosen = self.chosen(names)
        listed = [tag(f'{{"name": "{name}", "arguments": ', self.written(name), "}") for name in chosen]
        tags = [tag(f"{BEGIN}[", calls(listed, ", ", parallel), "]")]
        tags += [tag(f"{BEGIN}{name}{ARGUMENTS}", self.written(name), "") for name in chosen]
        return self.framed(tags, required, parallel)

    def tag(self, name: str) -> tuple[str, str]:
        return f'{BEGIN}[{{"name": "{name}", "arguments": ', "}]"
