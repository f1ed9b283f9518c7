"""Pictures, videos and sounds of a request: what the engine is told of each, and their tokens in the prefix tree.

Each takes a number of its prompt's tokens. All of them are the same placeholder to the model; in the tree they are ids
that follow from the content, so that the same picture is found again and another one never is.
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
    """One picture, video or sound, decoded and resized as its family wants it."""

    digest: bytes  # SHA-256 of the pixels, their shape and how they were made
    token: int  # the placeholder
    spans: list[tuple[int, int]]  # first token and number of tokens, in the order of its embeddings
    # uint8 [pictures, tiles or frames, height, width, 3]; of a sound the bytes of float32 [windows, bands, frames, 4].
    pixels: bytes
    shape: tuple[int, int, int, int]
    scale: list[float] = []  # three factors, then three summands: what makes the model's numbers of a pixel's
    extra: list[int] = []  # what else the family's tower must know
    # Of each span: steps in time, rows and columns, where tokens have places in these. [] elsewhere.
    grids: list[tuple[int, int, int]] = []
    times: list[int] = []  # the places in time of each span's steps, from its first; []: one after the other

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
        if len(item.pixels) != int(np.prod(item.shape)) or min(item.shape) < 1 or item.shape[3] not in (3, 4):
            return "a picture whose pixels are not of its shape"
        if item.grids and [t * h * w for t, h, w in item.grids] != [count for _, count in item.spans]:
            return "a picture whose tokens are not of its grid"
        if item.times and [*item.times] != sorted(max(0, time) for time in item.times):
            return "a video whose frames go back in time"
        for start, count in item.spans:
            if start < 0 or count < 1 or start + count > len(prompt) or content[start : start + count].any():
                return "a picture beyond the prompt, or over another one"
            content[start : start + count] = True
    return "" if bool((content == (prompt >= FIRST)).all()) else "tokens of content that no picture has"


def as_pixels(item: Media) -> NDArray[Any]:
    """uint8 [pictures, height, width, 3], read only."""
    return np.frombuffer(item.pixels, dtype=np.uint8).reshape(item.shape)


def as_sound(item: Media) -> NDArray[np.float32]:
    """float32 [windows, bands, frames], read only."""
    return np.frombuffer(item.pixels, dtype="<f4").reshape(item.shape[:3])


def places(media: Sequence[Media]) -> tuple[NDArray[np.int64], int]:
    """Time, height and width of every token up to the end of the last item [3, end], and the next place.

    A text's and a sound's tokens are one after the other in all three; a picture's or video's are a grid from where it
    begins, and what follows begins behind the grid's longest side (Wang et al., 2024, Qwen2-VL). A time may be further
    than the number of tokens: that of seconds in a video of few frames.

    Args:
        media: in the order of the prompt, with grids but for sounds.
    """
    end, at, place = media[-1].end, 0, 0
    found = np.zeros((3, end), dtype=np.int64)
    for item in media:
        times = np.asarray(item.times, dtype=np.int64)
        for (start, count), grid in zip(item.spans, item.grids, strict=True) if item.grids else ():
            found[:, at:start] = np.arange(place, place + start - at)
            place += start - at
            steps = np.indices(grid).reshape(3, -1)
            longest = max(grid)
            if len(times) == grid[0]:
                steps[0] = np.repeat(times, grid[1] * grid[2])
                longest = max(int(times[-1]) + 1, grid[1], grid[2])
            found[:, start : start + count] = steps + place
            place += longest
            at = start + count
    found[:, at:] = np.arange(place, place + end - at)
    return found, place + end - at


def reach(media: Sequence[Media], count: int) -> int:
    """Places that a prompt of so many tokens takes: its tokens, or where its pictures and videos are further."""
    ordered = sorted((item for item in media), key=lambda item: item.end)
    if not any(item.grids for item in ordered):
        return count
    _, place = places(ordered)
    return max(count, place + count - ordered[-1].end)
