"""Pictures on their way in a terminal that has colours: two pixels a character, one above the other."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from rich.color import Color
from rich.segment import Segment
from rich.style import Style

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from rich.console import Console, ConsoleOptions, RenderResult

    from phloem.core.messages import Painted

COUNT = 3  # of a picture
WIDEST = 48  # characters
HALF = "▀"


class Preview:
    """The last picture that was seen; a renderable of rich's. Args: where it will be shown."""

    def __init__(self, console: Console) -> None:
        shows = console.is_terminal and console.color_system in ("truecolor", "256")
        self.count = COUNT if shows else 0  # previews to ask for
        self._pixels: NDArray[np.uint8] | None = None

    def take(self, told: Painted) -> None:
        if self.count and told.preview >= 0:
            self._pixels = np.frombuffer(told.pixels, np.uint8).reshape(told.height, told.width, 3)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self._pixels is None:
            return
        room = max(1, options.size.height - 4)  # lines, beside the bar
        for above, below in _small(self._pixels, min(options.max_width, WIDEST), room):
            for one, other in zip(above, below, strict=True):
                yield Segment(HALF, Style(color=Color.from_rgb(*one), bgcolor=Color.from_rgb(*other)))
            yield Segment.line()


def _small(pixels_HWC: NDArray[np.uint8], columns: int, lines: int) -> NDArray[np.uint8]:
    """[lines, 2, columns, 3]: as many as keep the picture's shape, at most so many and never more than it has."""
    height, width, _ = pixels_HWC.shape
    scale = min(1.0, columns / width, 2 * lines / height)
    wide, high = max(1, int(width * scale)), max(1, int(height * scale / 2))
    rows = (np.arange(2 * high) + 0.5) * height / (2 * high)
    across = (np.arange(wide) + 0.5) * width / wide
    return pixels_HWC[rows.astype(int)][:, across.astype(int)].reshape(high, 2, wide, 3)
