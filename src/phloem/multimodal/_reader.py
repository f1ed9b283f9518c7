"""Reads the pictures of requests in a few threads, and puts them into prompts.

Fetching, decoding and resizing never run on the event loop, and only so many at a time; Pillow and numpy let go of the
interpreter while they work. What was made of a file is kept for a while by its bytes: the turns of a conversation bring
the same pictures again and again.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from phloem.core.errors import BadRequest, ConfigError
from phloem.core.media import Media
from phloem.multimodal import PROCESSORS, Facts
from phloem.multimodal._fetch import Rules, as_base64, fetch, is_address
from phloem.multimodal._pixels import available, decode

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from phloem.multimodal import Picture, Processor

THREADS, DIALLING = 4, 8
KEPT_BYTES = 256 << 20  # of pixels
MOST_PICTURES = 16  # of a request, where nobody says otherwise


@dataclass(frozen=True, slots=True)
class Source:
    """A picture as a client names it. `where`: the field, for errors; `data`: the file itself, where it is here.

    `plain`: the text is base64, whatever it looks like.
    """

    text: str
    where: str
    data: bytes | None = None
    plain: bool = False


class PictureReader:
    """One model's.

    Args:
        name: the processor's file.
        facts: what it is made of.
        token: the placeholder's id.
        limit: most pictures of a request.
    """

    def __init__(self, name: str, facts: Facts, token: int, rules: Rules, limit: int = MOST_PICTURES) -> None:
        self.processor: Processor = PROCESSORS.get(name)(facts)
        self.token, self.rules, self.limit = token, rules, limit
        self._name = name
        self._pool: ThreadPoolExecutor | None = None
        self._dialling: ThreadPoolExecutor | None = None  # apart: slow servers keep no picture that is here waiting
        self._kept: OrderedDict[bytes, tuple[Picture, bytes]] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    async def read(self, sources: Sequence[Source]) -> list[tuple[Picture, bytes]]:
        """What the processor makes of each, with its digest.

        Raises:
            BadRequest: there are too many, or one cannot be had, read or taken.
        """
        if len(sources) > self.limit:
            raise BadRequest(
                f"{len(sources)} pictures, {self.limit} are the most (--limit-mm-data-per-request)",
                param=sources[self.limit].where,
                code="too_many_images",
            )
        if sources and not available():
            raise BadRequest(
                "pictures need Pillow: pip install phloem[vision]", param=sources[0].where, code="not_supported"
            )
        if self._pool is None:
            self._pool = ThreadPoolExecutor(THREADS, "phloem-pictures")
            self._dialling = ThreadPoolExecutor(DIALLING, "phloem-addresses")
        return list(await asyncio.gather(*(self._read(item) for item in sources)))

    async def _read(self, source: Source) -> tuple[Picture, bytes]:
        loop = asyncio.get_running_loop()
        if self.rules.urls and source.data is None and not source.plain and is_address(source.text):
            data = await loop.run_in_executor(self._dialling, fetch, source.text, source.where, self.rules)
            source = replace(source, data=data)
        return await loop.run_in_executor(self._pool, self._one, source)

    def _one(self, source: Source) -> tuple[Picture, bytes]:
        data = source.data
        if data is None and source.plain:
            data = as_base64(source.text, source.where)
        elif data is None:
            data = fetch(source.text, source.where, self.rules)
        key = hashlib.sha256(data).digest()
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        try:
            picture = self.processor.make(decode(data, source.where))
        except ValueError as error:
            raise BadRequest(f"{source.where}: {error}", param=source.where, code="bad_image") from None
        made = picture, self._digest(picture)
        with self._lock:
            if key not in self._kept:
                self._kept[key] = made
                self._bytes += picture.pixels.nbytes
            while self._bytes > KEPT_BYTES and len(self._kept) > 1:
                self._bytes -= self._kept.popitem(last=False)[1][0].pixels.nbytes
        return made

    def _digest(self, picture: Picture) -> bytes:
        """Of all that the tower's answer depends on."""
        about = [self._name, picture.pixels.shape, picture.scale, picture.runs, picture.extra]
        return hashlib.sha256(json.dumps(about).encode() + np.ascontiguousarray(picture.pixels).tobytes()).digest()

    def close(self) -> None:
        for pool in (self._pool, self._dialling):
            if pool is not None:
                pool.shutdown(wait=False, cancel_futures=True)

    # into prompts

    def with_places(self, text: str, made: Sequence[tuple[Picture, bytes]], where: str) -> str:
        """The prompt with what stands for its pictures where their marks are. Raises BadRequest: other numbers."""
        mark, usual = self.processor.mark, "<image>"
        if made and mark not in text and text.count(usual) == len(made):
            text = text.replace(usual, self.processor.inline)  # what programs write that know no model
        parts = text.split(mark)
        self._check(len(parts) - 1, len(made), where)
        return parts[0] + "".join(picture.text + part for (picture, _), part in zip(made, parts[1:], strict=True))

    def with_ids(
        self, ids: Sequence[int], made: Sequence[tuple[Picture, bytes]], encode: Callable[[str], list[int]], where: str
    ) -> list[int]:
        """As `with_places`, of a prompt of token ids."""
        mark = encode(self.processor.mark)
        if len(mark) != 1:
            raise BadRequest("input_ids: this model's mark of a picture is no token: send text", param="input_ids")
        self._check(sum(1 for token in ids if token == mark[0]), len(made), where)
        rest, found = iter(made), list[int]()
        for token in ids:
            found += encode(next(rest)[0].text) if token == mark[0] else [token]
        return found

    def _check(self, places: int, pictures: int, where: str) -> None:
        if places != pictures:
            mark = self.processor.mark
            raise BadRequest(
                f"the prompt has {places} places for pictures ({mark}), the request {pictures} pictures", param=where
            )

    def grown(self, ids: list[int], made: Sequence[tuple[Picture, bytes]], where: str) -> tuple[list[int], list[Media]]:
        """The prompt with as many placeholders as its pictures take, and what the engine is told of them."""
        places = [at for at, token in enumerate(ids) if token == self.token]
        if len(places) != sum(len(picture.runs) for picture, _ in made):
            raise BadRequest("the prompt has placeholders of pictures that are none", param=where)
        found: list[int] = []
        media: list[Media] = []
        before, rest = 0, iter(places)
        for picture, digest in made:
            spans: list[tuple[int, int]] = []
            for count in picture.runs:
                at = next(rest)
                found += ids[before:at]
                spans.append((len(found), count))
                found += [self.token] * count
                before = at + 1
            pixels = np.ascontiguousarray(picture.pixels)
            shape = cast("tuple[int, int, int, int]", tuple(pixels.shape))
            media.append(
                Media(
                    digest=digest,
                    token=self.token,
                    spans=spans,
                    pixels=pixels.tobytes(),
                    shape=shape,
                    scale=list(picture.scale),
                    extra=list(picture.extra),
                )
            )
        return found + ids[before:], media


def limit_of(given: str | None) -> int:
    """Most pictures of a request, of `limit_mm_data_per_request`. Raises ConfigError."""
    if not given:
        return MOST_PICTURES
    try:
        found: Any = json.loads(given)
        limit = found.get("image", MOST_PICTURES)
    except (ValueError, AttributeError):
        limit = None
    if not isinstance(limit, int) or isinstance(limit, bool) or limit < 0:
        raise ConfigError(
            f'limit_mm_data_per_request: {given!r:.100} is not like {{"image": 4}}', param="limit_mm_data_per_request"
        )
    return limit


def settings_in(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """preprocessor_config.json and processor_config.json of a checkpoint, empty where there is none."""
    found: list[dict[str, Any]] = []
    for name in ("preprocessor_config.json", "processor_config.json"):
        path = folder / name
        try:
            value = json.loads(path.read_text("utf-8")) if path.exists() else {}
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path}: not readable as JSON: {error}") from None
        found.append(value if isinstance(value, dict) else {})
    inner = found[1].get("image_processor")
    # Newer files keep all processors in one.
    return found[0] or (cast("dict[str, Any]", inner) if isinstance(inner, dict) else {}), found[1]
