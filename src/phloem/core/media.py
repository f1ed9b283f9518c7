"""Pictures of a request: what the engine is told of each, and the tokens that stand for them in the prefix tree.

A picture takes a number of its prompt's tokens. All of them are the same placeholder to the model; in the tree they
are ids that follow from the picture's content, so that the same picture is found again and another one never is.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

FIRST = 1 << 30  # token ids from here on stand for content; no vocabulary is as large


class Media(msgspec.Struct, omit_defaults=True, kw_only=True):
    """One picture, decoded and resized as its family wants it."""

    digest: bytes  # SHA-256 of the pixels, their shape and how they were made
    token: int  # the placeholder
    spans: list[tuple[int, int]]  # first token and number of tokens, in the order of its embeddings
    pixels: bytes  # uint8 [pictures or tiles, height, width, 3]
    shape: tuple[int, int, int, int]
    scale: list[float] = []  # three factors, then three summands: what makes the model's numbers of a pixel's
    extra: list[int] = []  # what else the family's tower must know

    @property
    def count(self) -> int:
        """Tokens that it takes."""
        return sum(count for _, count in self.spans)

    @property
    def end(self) -> int:
        """Behind its last token."""
        return max((start + count for start, count in self.spans), default=0)


def content_ids(digest: bytes, count: int) -> NDArray[np.int32]:
    """The ids of a picture's tokens: 30 bits each, of a stream of bytes that SHAKE-256 makes of the digest."""
    words = np.frombuffer(hashlib.shake_256(digest).digest(4 * count), dtype="<u4")
    return ((words & (FIRST - 1)) | FIRST).astype(np.int32)


def with_content(ids: Sequence[int], media: Sequence[Media]) -> NDArray[np.int32]:
    """A prompt as the tree knows it."""
    found = np.asarray(ids, dtype=np.int32)
    for item in media:
        fresh, at = content_ids(item.digest, item.count), 0
        for start, count in item.spans:
            found[start : start + count] = fresh[at : at + count]
            at += count
    return found


def real_ids(ids: NDArray[np.int32], token: int) -> NDArray[np.int32]:
    """Those tokens as the model knows them."""
    return np.where(ids >= FIRST, np.int32(token), ids)


def misfit(media: Sequence[Media], prompt: NDArray[np.int32], vocab_size: int) -> str:
    """What does not fit together in a request with pictures; "": nothing."""
    content = np.zeros(len(prompt), dtype=np.bool_)
    for item in media:
        if not 0 <= item.token < vocab_size or len(item.digest) != 32:
            return "a picture without a placeholder or a digest"
        if len(item.pixels) != int(np.prod(item.shape)) or min(item.shape) < 1 or item.shape[3] != 3:
            return "a picture whose pixels are not of its shape"
        for start, count in item.spans:
            if start < 0 or count < 1 or start + count > len(prompt) or content[start : start + count].any():
                return "a picture beyond the prompt, or over another one"
            content[start : start + count] = True
    return "" if bool((content == (prompt >= FIRST)).all()) else "tokens of content that no picture has"


def as_pixels(item: Media) -> NDArray[Any]:
    """uint8 [pictures, height, width, 3], read only."""
    return np.frombuffer(item.pixels, dtype=np.uint8).reshape(item.shape)
