"""Reads the pictures, videos, documents and sounds of requests in a few threads, and puts them into prompts.

Fetching, decoding and resizing never run on the event loop, and only so many at a time; the decoders and numpy let go
of the interpreter while they work. Each kind has threads of its own: pictures wait for no video. What was made of a
file is kept for a while by its bytes: the turns of a conversation bring the same pictures again and again.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from phloem.core.errors import BadRequest
from phloem.multimodal import PROCESSORS, Facts, _audio, _pages, _pixels, _video
from phloem.multimodal._aside import Aside
from phloem.multimodal._fetch import Rules, as_base64, fetch, is_address
from phloem.multimodal._places import NAMES, Made, grown, with_ids, with_places
from phloem.multimodal._processed import Tensors
from phloem.multimodal._settings import MOST
from phloem.multimodal._video import Wanted

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from phloem.core.media import Media
    from phloem.multimodal import Picture, Processor

THREADS = {"image": 4, "video": 2, "audio": 2, "document": 2}
DIALLING = 8
KEPT_BYTES = 256 << 20  # of pixels
MOST_SOUND_SECONDS = 600.0
_NEEDS = {
    "image": (_pixels.available, "pictures need Pillow: pip install phloem[vision]"),
    "video": (_video.available, "videos need PyAV: pip install phloem[media]"),
    "document": (_pages.available, "documents need pypdfium2: pip install phloem[media]"),
}


@dataclass(frozen=True, slots=True)
class Source:
    """A picture, video, document or sound as a client names it.

    `where`: the field, for errors; `data`: the file itself, where it is here; `plain`: the text is base64, whatever it
    looks like; `read`: processors' tensors that have it, and its number among theirs.
    """

    text: str
    where: str
    data: bytes | None = None
    plain: bool = False
    kind: str = "image"  # or "video", "audio", "document"
    wanted: Wanted = Wanted()  # of a video
    read: tuple[Tensors, int] | None = None

    @property
    def shown(self) -> str:
        """The kind that it has in a prompt."""
        return "image" if self.kind == "document" else self.kind


class MediaReader:
    """One model's.

    Args:
        name: the processors' file.
        facts: what they are made of.
        tokens: the placeholders' ids by kind: those that the model takes.
        limits: the most of each kind in a request.
    """

    def __init__(
        self, name: str, facts: Facts, tokens: Mapping[str, int], rules: Rules, limits: Mapping[str, int] = MOST
    ) -> None:
        made = PROCESSORS.get(name)(facts)
        self.processors: dict[str, Processor] = {kind: made[kind] for kind in tokens}
        self.tokens, self.rules, self.limits = dict(tokens), rules, limits
        self._name = name
        self._pools: dict[str, ThreadPoolExecutor] = {}
        self._aside = {kind: Aside(kind, THREADS[kind]) for kind in ("video", "document")}
        self._kept: OrderedDict[bytes, Made] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    async def read(self, sources: Sequence[Source]) -> list[Made]:
        """What the processors make of each.

        Raises:
            BadRequest: there are too many, or one cannot be had, read or taken.
        """
        for kind, what in (*NAMES.items(), ("document", "documents")):
            own = [item for item in sources if item.kind == kind]
            limit = self.limits["page" if kind == "document" else kind]
            if len(own) > limit:
                raise self._too_many(len(own), what, limit, own[limit])
            if own and own[0].shown not in self.processors:
                raise BadRequest(f"this model takes no {what}", param=own[0].where, code="not_supported")
            if any(item.wanted.sound for item in own) and "audio" not in self.processors:
                name = "use_audio_in_video"
                raise BadRequest(f"{name}: this model does not hear videos", param=name, code="not_supported")
            available, needed = _NEEDS.get(kind, (None, ""))
            if own and available is not None and not available():
                raise BadRequest(needed, param=own[0].where, code="not_supported")
        made = list(await asyncio.gather(*(self._read(item) for item in sources)))
        count, limit = sum(len(one.parts) for one in made if one.kind == "image"), self.limits["image"]
        documents = [item for item in sources if item.kind == "document"]
        if documents and count > limit:
            raise self._too_many(count, "pictures and pages", limit, documents[-1])
        return made

    @staticmethod
    def _too_many(count: int, what: str, limit: int, source: Source) -> BadRequest:
        reason = f"{count} {what}, {limit} are the most (--limit-mm-data-per-request)"
        return BadRequest(reason, param=source.where, code=f"too_many_{source.kind}s")

    def _pool(self, name: str, threads: int) -> ThreadPoolExecutor:
        if name not in self._pools:
            self._pools[name] = ThreadPoolExecutor(threads, f"phloem-{name}")
        return self._pools[name]

    async def _read(self, source: Source) -> Made:
        loop = asyncio.get_running_loop()
        if (
            self.rules.urls
            and source.data is None
            and source.read is None
            and not source.plain
            and is_address(source.text)
        ):
            # Apart: slow servers keep nothing waiting that is here.
            pool = self._pool("addresses", DIALLING)
            try:
                data = await loop.run_in_executor(pool, fetch, source.text, source.where, self.rules)
            except BadRequest as error:
                raise _of_kind(error, source.kind) from None
            source = replace(source, data=data)
        return await loop.run_in_executor(self._pool(source.kind, THREADS[source.kind]), self._one, source)

    def _data(self, source: Source) -> bytes:
        if source.data is not None:
            return source.data
        try:
            if source.plain:
                return as_base64(source.text, source.where)
            return fetch(source.text, source.where, self.rules)
        except BadRequest as error:
            raise _of_kind(error, source.kind) from None

    def _one(self, source: Source) -> Made:
        if source.read is not None:
            return self._again(source, *source.read)
        data = self._data(source)
        about = json.dumps([source.kind, *astuple(source.wanted)]).encode()
        key = hashlib.sha256(about + hashlib.sha256(data).digest()).digest()
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        try:
            pictures = self._pictures(source, data)
        except ValueError as error:
            raise self._bad(source, error) from None
        made = Made(source.shown, [(self._whole(picture), self._digest(picture)) for picture in pictures])
        with self._lock:
            if key not in self._kept:
                self._kept[key] = made
                self._bytes += _bytes(made)
            while self._bytes > KEPT_BYTES and len(self._kept) > 1:
                self._bytes -= _bytes(self._kept.popitem(last=False)[1])
        return made

    def _again(self, source: Source, tensors: Tensors, number: int) -> Made:
        try:
            picture = tensors.picture(number, self.processors[source.shown])
        except ValueError as error:
            raise self._bad(source, error) from None
        return Made(source.shown, [(picture, self._digest(picture))], spread=True)

    @staticmethod
    def _bad(source: Source, error: ValueError) -> BadRequest:
        return BadRequest(f"{source.where}: {error}", param=source.where, code=f"bad_{source.kind}")

    def _pictures(self, source: Source, data: bytes) -> list[Picture]:
        make, where = self.processors[source.shown].make, source.where
        if source.kind == "document":
            with self._aside["document"].opened(data, where, most=self.limits["page"]) as paper:
                return [make(page) for page in paper.pages()]
        if source.kind == "video":
            with self._aside["video"].opened(data, where, wanted=source.wanted) as video:
                return [make(video.film())]
        if source.kind == "audio":
            return [make(_audio.decode(data, MOST_SOUND_SECONDS, where))]
        return [make(_pixels.decode(data, where))]

    def _whole(self, picture: Picture) -> Picture:
        """With the digest of the sound in a video."""
        if picture.beside is None:
            return picture
        return replace(picture, beside=(picture.beside[0], self._digest(picture.beside[0])))

    def _digest(self, picture: Picture) -> bytes:
        """Of all that the tower's answer, and the places of its tokens, depend on."""
        about: list[Any] = [self._name, picture.pixels.shape, picture.scale, picture.runs, picture.extra]
        if picture.times or len(picture.grids) > 1:
            about += [picture.grids, picture.times, picture.mingled]
        return hashlib.sha256(json.dumps(about).encode() + np.ascontiguousarray(picture.pixels).tobytes()).digest()

    def close(self) -> None:
        for pool in self._pools.values():
            pool.shutdown(wait=False, cancel_futures=True)
        for aside in self._aside.values():
            aside.close()

    # into prompts

    def with_places(self, text: str, made: Sequence[Made], where: str) -> tuple[str, list[Made]]:
        """The prompt with what stands for its media where their marks are, and these in its order. Raises BadRequest:
        other numbers."""
        return with_places(text, made, self.processors, where)

    def with_ids(
        self, ids: Sequence[int], made: Sequence[Made], encode: Callable[[str], list[int]], where: str
    ) -> tuple[list[int], list[Made]]:
        """As `with_places`, of a prompt of token ids."""
        return with_ids(ids, made, self.processors, encode, where)

    def grown(self, ids: list[int], made: Sequence[Made], where: str) -> tuple[list[int], list[Media]]:
        """The prompt with as many placeholders as its media take, and what the engine is told of them."""
        return grown(ids, made, self.tokens, where)


def _of_kind(error: BadRequest, kind: str) -> BadRequest:
    """Files are fetched alike, whatever they are; the code says what it was to be."""
    error.code = (error.code or "bad_image").replace("image", kind)
    return error


def _bytes(made: Made) -> int:
    sounds = (picture.beside[0].pixels.nbytes for picture, _ in made.parts if picture.beside is not None)
    return sum(picture.pixels.nbytes for picture, _ in made.parts) + sum(sounds)
