"""Numbers of few bits and their scales, as a source gives them to op tables whose kernels multiply them as they are.

A source says what it has (`Narrow`) before anything is read, so that a table chooses without values too. Legend: M
outputs, N inputs; a scale stands for a tile of `high` rows and `wide` columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor

FLOAT8_BLOCK = 128  # rows and columns of a block of float8 that shares a scale
LEAST_GROUP, MOST_GROUP = 32, 128  # columns of a group of 4-bit numbers
FLOAT4_GROUP = 32  # columns of a group of 4-bit floats
MOST_POWER = 113  # of two: beyond, times 6, is no scale of a weight, and the byte 255 is no number


@dataclass(frozen=True, slots=True)
class Narrow:
    """What a source can give of a matrix: e4m3 float8 with a scale per row (`high` 1, `wide` all columns) or per block
    of 128 x 128, numbers 0 to 15 ("int8": 0 to 255) with a scale, and perhaps a zero point, per row and group of
    columns, 4-bit floats (e2m1) with a power of two per row and 32 columns, or blocks of a GGUF type."""

    kind: Literal["float8", "int4", "int8", "mxfp4", "gguf"]
    high: int
    wide: int
    zeros: bool = False
    half: bool = False  # of "int8": float16 holds the scales
    stored: str = ""  # the GGUF type


@dataclass(frozen=True, slots=True, eq=False)
class Codes:
    """(value - zero) * scale, where a missing zero is 0 of floats, 8 of 4-bit and 128 of 8-bit numbers."""

    values: Tensor  # float8_e4m3fn, or uint8, numbers or codes of e2m1: [M, N]; of GGUF [M, bytes a row], on the host
    scale: Tensor  # float32 [M / high, N / wide], rounded up; of a GGUF type empty
    zero: Tensor | None = None  # float32, as the scale


@runtime_checkable
class GivesCodes(Protocol):
    """A `WeightSource` that may be narrow."""

    def narrow(self) -> Narrow | str:
        """What it can give, or why not; "": it is stored plainly."""
        ...

    def codes(self) -> Codes:
        """What `narrow` has promised."""
        ...

    def refused(self, why: str) -> None:
        """The op table takes it unpacked all the same."""
        ...


def narrow_of(part: Any) -> Narrow | str:
    """As `GivesCodes.narrow`, of any `WeightSource`."""
    return part.narrow() if isinstance(part, GivesCodes) else ""


def group_width(width: int, cols: slice) -> int:
    """The largest power of two, from 32 to 128, that cuts groups of `width` columns and these columns evenly; 0: none
    does."""
    found = MOST_GROUP
    while found >= LEAST_GROUP:
        if not (width % found or cols.start % found or cols.stop % found):
            return found
        found //= 2
    return 0
