"""What a server of a language model and an encoder server say to each other, in bodies of HTTP.

One item is asked for at a time: msgpack of plain data there, and back the raw bytes of its embeddings behind their
shape. Nothing is ever unpickled. Imports no torch: the process that answers HTTP takes a size from here.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

import msgspec

from phloem.core.errors import BadRequest
from phloem.core.media import Media
from phloem.disagg.wire import differing

if TYPE_CHECKING:
    from collections.abc import Mapping

VERSION = 1
PATH = "/encode_media"
RAW = "application/octet-stream"
MOST_ASKED = 256 << 20  # bytes of a body: 64 megapixels take 192 MiB
ITEMSIZE = {"float32": 4, "float16": 2, "bfloat16": 2}  # of the types that embeddings have
MISFIT, AGAIN = 409, 503  # the servers do not belong together; another one may take it


class Look(msgspec.Struct, frozen=True):
    """Encode this item. `facts`: what both servers must have alike (`engine.encoding.facts_of`)."""

    item: Media
    facts: dict[str, str]
    version: int = VERSION


class Made(msgspec.Struct, frozen=True):
    """Embeddings [tokens, M] of the item with this digest, little-endian, row by row."""

    digest: bytes
    shape: tuple[int, int]
    kind: str
    data: bytes


class Misfit(Exception):
    """Two servers that do not belong together, and why."""


_encoder = msgspec.msgpack.Encoder()
_look = msgspec.msgpack.Decoder(Look)
_made = msgspec.msgpack.Decoder(Made)


def encode(message: Look | Made) -> bytes:
    return _encoder.encode(message)


def read_look(data: bytes, facts: Mapping[str, str]) -> Media:
    """The item that somebody asks an encoder server about.

    Raises:
        BadRequest: it is none, or contradicts itself.
        Misfit: the other server has another model, or speaks otherwise.
    """
    try:
        look = _look.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadRequest(f"a body that is no request for embeddings: {error!s:.300}") from None
    if look.version != VERSION:
        raise Misfit(f"version {look.version} of the protocol, and not {VERSION}: update the older server")
    if why := differing(facts, look.facts):
        raise Misfit(why)
    item = look.item
    if item.features or len(item.pixels) != prod(item.shape) or min(item.shape) < 1 or item.shape[3] not in (3, 4):
        raise BadRequest("an item whose pixels are not of its shape")
    if not item.spans or any(start < 0 or count < 1 for start, count in item.spans) or len(item.digest) != 32:
        raise BadRequest("an item without tokens, or without a digest")
    if item.shape[3] == 3 and len(item.scale) != 6:
        raise BadRequest("an item whose pixels cannot be scaled")
    return item


def read_made(data: bytes, item: Media, kind: str, width: int) -> Made:
    """What an encoder server has answered for an item. `width`: values of one embedding.

    Raises:
        ValueError: it is no answer, or not the one to this question.
    """
    try:
        made = _made.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"an answer that is none: {error!s:.200}") from None
    if made.digest != item.digest:
        raise ValueError("the embeddings of another item")
    if made.kind != kind or made.shape != (item.count, width):
        raise ValueError(
            f"embeddings {list(made.shape)} of {made.kind:.20}, where [{item.count}, {width}] of {kind} were asked for"
        )
    if len(made.data) != prod(made.shape) * ITEMSIZE[kind]:
        raise ValueError(f"{len(made.data)} bytes for embeddings {list(made.shape)} of {kind}")
    return made


def most_answered(item: Media, kind: str, width: int) -> int:
    """Bytes of the largest answer that can be right."""
    return item.count * width * ITEMSIZE[kind] + 4096
