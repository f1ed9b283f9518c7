"""Formats that keep all calls of an answer in one JSON array behind a marker."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from phloem.text.tools._grammar import Shape, calls, tag
from phloem.text.tools._json import JsonReader

if TYPE_CHECKING:
    from collections.abc import Iterable

    from phloem.text.tools._base import Steps


class ArrayReader(JsonReader):
    """`begins` are markers in front of the array, `trigger` the one that is enforced, `close` what may stand behind."""

    sections = True
    close: ClassVar[str] = ""
    enforced_close: ClassVar[str] = ""

    def section(self, marker: str) -> Steps[None]:
        yield from self.spaces()
        yield from self.named_objects()
        if self.close:
            yield from self.optional(self.close)

    def item(self, name: str) -> tuple[str, str]:
        """What stands before and behind a call's arguments."""
        return f'{{"name": "{name}", "arguments": ', "}"

    def shape(self, name: str) -> Shape:
        """One call in the array."""
        begin, end = self.item(name)
        return tag(begin, self.written(name), end)

    def structure(self, names: Iterable[str] | None = None, required: bool = False, parallel: bool = True) -> Shape:
        listed = calls([self.shape(name) for name in self.chosen(names)], ", ", parallel)
        return self.framed([tag(f"{self.trigger}[", listed, f"]{self.enforced_close}")], required, parallel)

    def tag(self, name: str) -> tuple[str, str]:
        begin, end = self.item(name)
        return f"{self.trigger}[{begin}", f"{end}]{self.enforced_close}"
