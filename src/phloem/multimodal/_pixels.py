"""From the bytes of a file to pixels, and what processors do to them, with Pillow and numpy."""

from __future__ import annotations

import importlib.util
import io
from typing import TYPE_CHECKING, Any

import numpy as np

from phloem.core.errors import BadRequest

if TYPE_CHECKING:
    from numpy.typing import NDArray

MOST_PIXELS = 64 << 20  # of one picture, looked up in its header before anything is decoded
MOST_SCANS = 256  # of a JPEG, each of which goes over the whole picture; files have about ten
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)


def available() -> bool:
    """Whether pictures can be read here."""
    return importlib.util.find_spec("PIL") is not None


def decode(data: bytes, where: str, most: int = MOST_PIXELS) -> Any:
    """A Pillow image in RGB, upright; of an animated one the first frame.

    Raises:
        BadRequest: it is no picture, is broken or is too large.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        width, height = image.size
        if width * height > most:
            raise BadRequest(f"{where}: {width} x {height} pixels are more than {most}", param=where, code="too_large")
        if data.count(b"\xff\xda") > MOST_SCANS and image.format in ("JPEG", "MPO", "TIFF"):
            raise BadRequest(f"{where}: more than {MOST_SCANS} scans", param=where, code="too_large")
        return ImageOps.exif_transpose(image).convert("RGB")
    except UnidentifiedImageError:
        kinds = ", ".join(FORMATS)
        raise BadRequest(f"{where}: no picture of a known kind ({kinds})", param=where, code="bad_image") from None
    except Image.DecompressionBombError as error:
        raise BadRequest(f"{where}: {error}", param=where, code="too_large") from None
    except BadRequest:
        raise
    except Exception as error:  # decoders raise whatever they like for broken files
        raise BadRequest(f"{where}: the picture is broken: {error}", param=where, code="bad_image") from None


def resized(image: Any, width: int, height: int, settings: dict[str, Any], default: int = 3) -> Any:
    """To this size, by the filter that `settings` name (Pillow's number; 3 is bicubic).

    Raises:
        ValueError: it would have too many pixels, as very narrow pictures may.
    """
    from PIL import Image

    if image.size == (width, height):
        return image
    if width * height > MOST_PIXELS:
        was = "{} x {}".format(*image.size)
        raise ValueError(f"{was} would be read as {width} x {height} pixels, more than {MOST_PIXELS}")
    given = settings.get("resample")
    by = Image.Resampling(default if given is None else int(given))
    # Pillow widens rows before it makes them fewer: a column of a million pixels would take gigabytes on the way.
    if width * image.height > MOST_PIXELS:
        image = image.resize((image.width, height), by)
    return image.resize((width, height), by)


def as_array(image: Any) -> NDArray[np.uint8]:
    """[height, width, 3]."""
    return np.asarray(image, dtype=np.uint8)


def scale_of(
    settings: dict[str, Any], mean: tuple[float, ...] = CLIP_MEAN, std: tuple[float, ...] = CLIP_STD
) -> tuple[float, ...]:
    """`Media.scale` of the settings' factor, mean and deviation."""
    factor = float(settings.get("rescale_factor", 1 / 255)) if settings.get("do_rescale", True) else 1.0
    if not settings.get("do_normalize", True):
        return (factor,) * 3 + (0.0,) * 3
    means, stds = settings.get("image_mean") or mean, settings.get("image_std") or std
    return tuple(factor / s for s in stds) + tuple(-m / s for m, s in zip(means, stds, strict=True))
