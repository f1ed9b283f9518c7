"""Pictures that a processor of transformers has read already: `pixel_values`, as programs send them to SGLang.

They are made the pixels again that they were made of. So all that follows is as for a file: the prompt, the cache by
content, the way to the engine. What our own processor would change once more is refused.
"""

from __future__ import annotations

import base64
import binascii
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol, cast, runtime_checkable

import numpy as np

from phloem.core.errors import BadRequest
from phloem.multimodal._pixels import MOST_PIXELS

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from phloem.multimodal import Picture, Processor

FORMAT = "processor_output"
_TYPES = {"float32": np.dtype("<f4"), "float16": np.dtype("<f2")}
_MOST = 1024  # pictures of one object; a request may have fewer
_DEEP = 5
_OFF = 0.2  # of a pixel's step: what float16 loses, and less than bfloat16 does


@runtime_checkable
class Seeing(Protocol):
    """A processor of pictures. `scale`: as `Picture.scale`."""

    scale: tuple[float, ...]


@runtime_checkable
class Patching(Seeing, Protocol):
    """One whose tensors are patches. `block`: the side of those that become one token."""

    patch: int
    block: int


class Tensors:
    """What a processor made of one picture or several: nested lists, arrays, tensors, or objects of base64 with
    `dtype` and `shape`. Nothing is converted before `picture` is called, which a thread does.

    Raises:
        BadRequest: there is no `pixel_values`.
    """

    def __init__(self, given: dict[str, Any], where: str) -> None:
        self._given, self._where = given, where
        if given.get("pixel_values") is None:
            raise BadRequest(f"{where}.pixel_values is missing", param=f"{where}.pixel_values")
        grids = given.get("image_grid_thw")
        self._gridded = grids is not None
        shape = _shape_of(grids if self._gridded else given["pixel_values"])
        self.count = 1 if not self._gridded and len(shape) == 3 else (*shape, 0)[0]
        if not 1 <= self.count <= _MOST:
            raise BadRequest(f"{where}: {self.count} pictures; expected 1 to {_MOST}", param=where)

    def picture(self, number: int, processor: Processor) -> Picture:
        """The one of this number, read again.

        Raises:
            BadRequest: a tensor is none.
            ValueError: it is not what this processor makes of a picture.
        """
        from PIL import Image

        if not isinstance(processor, Seeing):
            raise ValueError("processed pictures are not taken by this model")
        values = self._patches(number, processor) if self._gridded else self._square(number)
        if values.shape[0] * values.shape[1] > MOST_PIXELS:
            raise ValueError(f"more than {MOST_PIXELS} pixels")
        factors, summands = (np.asarray(processor.scale[at : at + 3], np.float32) for at in (0, 3))
        with np.errstate(all="ignore"):
            whole = np.rint(exact := (values - summands) / factors)
        if not np.all(np.abs(exact - whole) <= _OFF) or whole.min() < 0 or whole.max() > 255:
            raise ValueError("pixel_values are not those of a picture by this model's mean and deviation")
        pixels = whole.astype(np.uint8)
        made = processor.make(Image.fromarray(pixels))
        if not np.array_equal(made.pixels, pixels[None]):
            raise ValueError("pixel_values are not what this model's processor makes of a whole picture")
        return made

    @cached_property
    def _values(self) -> NDArray[np.float32]:
        return _array(self._given["pixel_values"], f"{self._where}.pixel_values")

    @cached_property
    def _grids(self) -> NDArray[np.int64]:
        return self._whole("image_grid_thw", 3)

    def _whole(self, name: str, width: int) -> NDArray[np.int64]:
        """[pictures, width], above 0."""
        found = _array(self._given[name], f"{self._where}.{name}")
        if found.shape != (self.count, width) or not np.all((found >= 1) & (found < 1 << 20) & (found % 1 == 0)):
            message = f"expected {self.count} times {width} whole numbers above 0"
            raise BadRequest(f"{self._where}.{name}: {message}", param=f"{self._where}.{name}")
        return found.astype(np.int64)

    def _square(self, number: int) -> NDArray[np.float32]:
        """[height, width, 3] of [pictures, 3, height, width], filled up to the largest where `image_sizes` says so."""
        values = self._values[None] if self._values.ndim == 3 else self._values
        if values.ndim != 4 or values.shape[:2] != (self.count, 3) or not values.size:
            raise ValueError(f"pixel_values of shape {values.shape!s:.100}; expected [pictures, 3, height, width]")
        found = values[number].transpose(1, 2, 0)
        if self._given.get("image_sizes") is None:
            return found
        height, width = self._whole("image_sizes", 2)[number]
        if height > found.shape[0] or width > found.shape[1]:
            raise ValueError("image_sizes are larger than pixel_values")
        return found[:height, :width]

    def _patches(self, number: int, processor: Seeing) -> NDArray[np.float32]:
        """[height, width, 3] of [patches, 3 * frames * side * side], in blocks; a picture's frames are all the same."""
        if not isinstance(processor, Patching):
            raise ValueError("this model's pictures have no image_grid_thw")
        counts = self._grids.prod(1)
        side, merge = processor.patch, processor.block // processor.patch
        steps, rows, columns = (int(each) for each in self._grids[number])
        values, frames = self._values, (self._values.shape[-1] if self._values.ndim else 0) // (3 * side * side)
        if values.shape != (counts.sum(), 3 * frames * side * side) or not frames:
            raise ValueError(f"pixel_values of shape {values.shape!s:.100} for {counts.sum()} patches")
        if steps != 1 or rows % merge or columns % merge:
            raise ValueError(f"a picture of {steps} x {rows} x {columns} patches; expected 1 x whole blocks of {merge}")
        own = values[counts[:number].sum() :][: rows * columns]
        cut = own.reshape(rows // merge, columns // merge, merge, merge, 3, frames, side, side)[:, :, :, :, :, 0]
        return cut.transpose(0, 2, 5, 1, 3, 6, 4).reshape(rows * side, columns * side, 3)


def _shape_of(value: Any, deep: int = _DEEP) -> tuple[int, ...]:
    """As the first elements say."""
    if isinstance(value, dict):
        value = cast("dict[str, Any]", value).get("shape")
        sides = cast("list[Any]", value if isinstance(value, list | tuple) else [])
        return tuple(side if isinstance(side, int) else 0 for side in sides)
    if not isinstance(value, list | tuple):
        return tuple(np.shape(value))
    items = cast("list[Any]", value)
    return (len(items), *(_shape_of(items[0], deep - 1) if items and deep else ()))


def _array(value: Any, where: str) -> NDArray[np.float32]:
    try:
        if isinstance(value, dict):
            found = cast("dict[str, Any]", value)
            kind = _TYPES[found["dtype"]]
            value = np.frombuffer(base64.b64decode(found["data"], validate=True), kind).reshape(found["shape"])
        with np.errstate(all="ignore"):
            return np.asarray(value, dtype=np.float32)
    except (binascii.Error, KeyError, MemoryError, OverflowError, TypeError, ValueError):
        message = f"{where}: expected numbers of one shape, or base64 with dtype (float32, float16) and shape"
        raise BadRequest(message, param=where, code="bad_image") from None
