"""What readers of Pythonic calls share whose calls always stand between two markers: no text is taken for a call."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from phloem.text.tools import pythonic
from phloem.text.tools._base import ToolParser
from phloem.text.tools._grammar import Shape, calls, tag

if TYPE_CHECKING:
    from collections.abc import Iterable


class Marked(pythonic.Parser):
    """A format gives `begins`, `end` and `trigger`, and what stands around and between its calls."""

    lead = ""
    sections = True
    around: ClassVar[tuple[str, str]] = ("", "")
    between: ClassVar[str] = ", "

    def structure(self, names: Iterable[str] | None = None, required: bool = False, parallel: bool = True) -> Shape:
        listed = calls([self.one_call(name) for name in self.chosen(names)], self.between, parallel)
        first, last = self.around
        return self.framed([tag(self.begins[0] + first, listed, last + self.end)], required, parallel)

    def instead(self, answer: Shape, names: Iterable[str] | None = None, parallel: bool = True) -> Shape:
        return ToolParser.instead(self, answer, names, parallel)
