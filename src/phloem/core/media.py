"""Pictures, videos and sounds of a request: what the engine is told of each, and their tokens in the prefix tree.

Each takes a number of its prompt's tokens. All of them are the same placeholder to the model; in the tree they are ids
that follow from the content, so that the same picture is found again and another one never is.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

MINGLED, FOLDED = 1, 2
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
    # The places in time of each span's steps, from its first; []: one after the other. With `mingled` of all steps.
    times: list[int] = []
    # Its spans lie among those of another, by time, and the places of both begin together: `MINGLED`, or `FOLDED`,
    # where the two tokens in front share a place, and so do the two behind. `grids` is then one, of all spans.
    mingled: int = 0
    # What an encoder server has made of it: little-endian values of this type, as many for each token. `pixels` is
    # then empty.
    features: bytes = b""
    kind: str = ""

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
        counts = [item.count] if item.mingled else [count for _, count in item.spans]
        if item.grids and [t * h * w for t, h, w in item.grids] != counts:
            return "a picture whose tokens are not of its grid"
        if item.mingled and len(item.times) != (item.grids[0][0] if item.grids else item.count):
            return "a video or its sound without places in time"
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
    """Time, height and width of every token up to the end of the last item [3, end], and the next place. (Behind a
    video with its sound the end may be two tokens later, whose places are not one after the other.)

    A text's and a sound's tokens are one after the other in all three; a picture's or video's are a grid from where it
    begins, and what follows begins behind the grid's longest side (Wang et al., 2024, Qwen2-VL). A time may be further
    than the number of tokens: that of seconds in a video of few frames. A video and its sound begin together; what
    follows begins behind the last of their spans.

    Args:
        media: in the order of the prompt, with grids but for sounds.
    """
    spans = sorted((one for item in media for one in _spans(item)), key=lambda one: one.start)
    last = spans[-1] if spans else None
    end = 0 if last is None else last.start + last.steps.shape[1]
    end = max(end, media[-1].end) + 2 * (last is not None and last.kind == FOLDED)
    found = np.zeros((3, end), dtype=np.int64)
    at = place = base = 0
    before = 0  # how the span before is mingled
    for one in spans:
        gap, count = one.start - at, one.steps.shape[1]
        if gap or not (before and one.kind):
            place = _text(found[:, at : one.start], place, before == FOLDED, one.kind == FOLDED)
            base = place
        found[:, one.start : one.start + count] = one.steps + base
        place = base + one.longest
        at, before = one.start + count, one.kind
    return found, _text(found[:, at:], place, before == FOLDED, False)


@dataclass(slots=True)
class _Span:
    start: int
    steps: NDArray[np.int64]  # [3, tokens]: places from where it begins, or where it and its fellow begin
    longest: int  # behind the furthest of them
    kind: int  # `Media.mingled`


def _spans(item: Media) -> Iterator[_Span]:
    """Those with places of their own."""
    times = np.asarray(item.times, dtype=np.int64)
    if item.mingled:
        steps = np.repeat(times[None], 3, axis=0) if not item.grids else _grid(item.grids[0], times)
        at = 0
        for start, count in item.spans:
            own = steps[:, at : at + count]
            yield _Span(start, own, int(own.max()) + 1, item.mingled)
            at += count
        return
    for (start, _), grid in zip(item.spans, item.grids, strict=True) if item.grids else ():
        steps = _grid(grid, times if len(times) == grid[0] else np.arange(grid[0]))
        yield _Span(start, steps, int(steps.max()) + 1, 0)


def _grid(grid: tuple[int, int, int], times: NDArray[np.int64]) -> NDArray[np.int64]:
    steps = np.indices(grid).reshape(3, -1)
    steps[0] = np.repeat(times, grid[1] * grid[2])
    return steps


def _text(found_3T: NDArray[np.int64], place: int, behind: bool, ahead: bool) -> int:
    """Places of a text's tokens, from one on; of two that share one `behind` a video with its sound, and `ahead` of
    one. Gives the next."""
    count = found_3T.shape[1]
    own = np.arange(place, place + count)
    if behind:
        own[1:] -= 1
    if ahead and count and own[-1]:
        own[-1] -= 1
    found_3T[:] = own
    return int(own[-1]) + 1 if count else place


def reach(media: Sequence[Media], count: int) -> int:
    """Places that a prompt of so many tokens takes: its tokens, or where its pictures and videos are further."""
    ordered = sorted((item for item in media), key=lambda item: item.end)
    if not any(item.grids for item in ordered):
        return count
    found, place = places(ordered)
    return max(count, place + count - found.shape[1])
