"""Answers and events of pictures, in OpenAI's shapes. `seed` is ours: with it a picture can be drawn again."""

from __future__ import annotations

import base64
import importlib.util
import io
import time
from typing import TYPE_CHECKING, Literal

from msgspec import UNSET, UnsetType

from phloem.core.errors import BadRequest
from phloem.protocol.answers import Answer
from phloem.server.images.body import ImageEditsBody
from phloem.utils.png import png

if TYPE_CHECKING:
    from phloem.core.messages import Painted
    from phloem.server.images.body import ImagesBody

_QUALITY = 90  # of jpeg and webp, where nothing is asked for


class InputDetails(Answer, kw_only=True):
    text_tokens: int = 0
    image_tokens: int = 0


class ImageUsage(Answer, kw_only=True):
    """Tokens of the prompts as the encoder counts them, and of the latents."""

    input_tokens: int = 0
    output_tokens: int = 0
    total_tokens: int = 0
    input_tokens_details: InputDetails


class Image(Answer, kw_only=True):
    b64_json: str
    seed: int
    revised_prompt: str | None = None


class ImagesAnswer(Answer, kw_only=True):
    created: int
    data: list[Image]
    output_format: str
    size: str
    quality: str = "auto"
    background: str = "opaque"
    usage: ImageUsage


class ImageEvent(Answer, kw_only=True):
    """Of a stream: a picture on its way, or finished; `index` tells the pictures of one request apart."""

    type: Literal[
        "image_generation.partial_image",
        "image_generation.completed",
        "image_edit.partial_image",
        "image_edit.completed",
    ]
    b64_json: str
    created_at: int
    size: str
    quality: str = "auto"
    background: str = "opaque"
    output_format: str
    index: int = 0
    seed: int
    partial_image_index: int | UnsetType = UNSET
    usage: ImageUsage | UnsetType = UNSET


def check_format(body: ImagesBody) -> None:
    """Whether this file format can be written here. Raises BadRequest."""
    if body.output_format in ("jpeg", "webp") and importlib.util.find_spec("PIL") is None:
        raise BadRequest(f"output_format: {body.output_format} needs Pillow on the server", param="output_format")
    if body.output_compression not in (None, 100) and body.output_format not in ("jpeg", "webp"):
        raise BadRequest("output_compression: png loses nothing; ask for jpeg or webp", param="output_compression")


def file_of(told: Painted, kind: str, quality: int | None) -> bytes:
    """The picture as a file."""
    if kind == "png":
        return png(told.pixels, told.width, told.height)
    from PIL import Image as Pillow

    written = io.BytesIO()
    picture = Pillow.frombytes("RGB", (told.width, told.height), told.pixels)
    picture.save(written, kind.upper(), quality=_QUALITY if quality is None else quality)
    return written.getvalue()


def coded(told: Painted, body: ImagesBody) -> str:
    return base64.b64encode(file_of(told, body.output_format or "png", body.output_compression)).decode("ascii")


def usage(pictures: list[Painted]) -> ImageUsage:
    text = pictures[0].text_tokens if pictures else 0  # a prompt is read once, however many pictures it makes
    seen = pictures[0].seen_tokens if pictures else 0  # and so is a picture
    latents = sum(told.image_tokens for told in pictures)
    details = InputDetails(text_tokens=text, image_tokens=seen)
    total = text + seen + latents
    return ImageUsage(input_tokens=text + seen, output_tokens=latents, total_tokens=total, input_tokens_details=details)


def answer(pictures: list[Painted], seeds: list[int], body: ImagesBody) -> ImagesAnswer:
    return ImagesAnswer(
        created=int(time.time()),
        data=[Image(b64_json=coded(told, body), seed=seed) for told, seed in zip(pictures, seeds, strict=True)],
        output_format=body.output_format or "png",
        size=f"{pictures[0].width}x{pictures[0].height}",
        usage=usage(pictures),
    )


def event(told: Painted, index: int, seed: int, body: ImagesBody) -> ImageEvent:
    made: Literal["image_generation", "image_edit"] = (
        "image_edit" if isinstance(body, ImageEditsBody) else "image_generation"
    )
    return ImageEvent(
        type=f"{made}.completed" if told.done else f"{made}.partial_image",  # type: ignore[arg-type]
        b64_json=coded(told, body),
        created_at=int(time.time()),
        size=f"{told.width}x{told.height}",
        output_format=body.output_format or "png",
        index=index,
        seed=seed,
        partial_image_index=UNSET if told.done else told.preview,
        usage=usage([told]) if told.done else UNSET,
    )
