"""Jobs of films and their files: one folder, in which what is half written never shows, under a budget of bytes.

A job is a JSON file, its film an mp4 beside it. A server that starts on a folder reads what is there; what ran when the
last one ended has failed. Used in the event loop alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import tempfile
import time
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from phloem.core.errors import ConfigError, NotFound, StorageFailed
from phloem.server.videos.folder import FilmFolder
from phloem.server.videos.write import Video, VideoError
from phloem.utils.leftovers import prefix

if TYPE_CHECKING:
    from phloem.client.pictures import Painting

log = logging.getLogger("phloem.server")
MAX_JOBS = 10_000  # that have ended
PART = ".part"


@dataclass(eq=False)
class Kept:
    """`call`: what makes it, while it runs; `size`: bytes of its film."""

    video: Video
    call: Painting | None = None
    size: int = 0


class VideoStore:
    """Args: the folder (None: its own, gone with the server), most bytes of films, seconds that they are kept.

    Raises:
        ConfigError: a bound is none.
    """

    def __init__(self, folder: FilmFolder | None, max_bytes: int, ttl: float) -> None:
        for name, value in (("video_max_bytes", max_bytes), ("video_ttl", ttl)):
            if not 0 < value < inf:
                raise ConfigError(f"{name}: {value} must be above 0", param=name)
        self.max_bytes = max_bytes
        self.tasks: set[asyncio.Task[None]] = set()  # nobody else holds them
        self._ttl = ttl
        self._kept: dict[str, Kept] = {}
        self._own: tempfile.TemporaryDirectory[str] | None = None
        self._folder = folder
        self._timer: asyncio.TimerHandle | None = None
        self._path: Path | None = None
        if folder is not None:
            self._open(folder.path)

    # --- the folder

    def _open(self, path: Path) -> None:
        self._path = path
        for part in path.glob(f".video_*{PART}"):
            part.unlink(missing_ok=True)
        for index in sorted(path.glob("video_*.json")):
            self._read(index)

    def _read(self, index: Path) -> None:
        try:
            video = msgspec.json.decode(index.read_bytes(), type=Video)
        except (OSError, msgspec.MsgspecError, UnicodeError) as error:
            log.warning("%s is not read: %s", index, error)
            return
        if f"{video.id}.json" != index.name:
            log.warning("%s is not read: it is of another film", index)
            return
        kept = self._kept[video.id] = Kept(video)
        film = index.with_suffix(".mp4")
        if video.running:
            self.fail(kept, "server_stopped", "the server stopped before the film was finished")
        elif video.status == "completed":
            if film.is_file():
                kept.size = film.stat().st_size
            else:
                self.fail(kept, "lost", "the film's file is gone")

    @property
    def path(self) -> Path:
        if self._path is None:
            self._own = tempfile.TemporaryDirectory(prefix=prefix("films"))
            self._path = Path(self._own.name)
        return self._path

    def film(self, key: str) -> Path:
        return self.path / f"{key}.mp4"

    def content(self, key: str) -> Path:
        """The file of a completed film. Raises NotFound: others have removed it, or its folder."""
        path = self.film(key)
        if not path.is_file():
            raise NotFound("the film's file is gone from its folder", param="video_id", code="video_lost")
        return path

    def part(self, key: str) -> Path:
        """Where a film is written before it is whole."""
        return self.path / f".{key}.mp4{PART}"

    def _write(self, video: Video) -> None:
        """All of it or nothing. Raises StorageFailed."""
        part = self.path / f".{video.id}.json{PART}"
        try:
            part.write_bytes(msgspec.json.encode(video))
            os.replace(part, self.path / f"{video.id}.json")
        except OSError as error:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)
            raise StorageFailed(f"the folder of films cannot be written: {error.strerror}") from error

    def close(self) -> None:
        """Let another server have the folder."""
        if self._folder is not None:
            self._folder.close()

    # --- jobs

    def add(self, video: Video, call: Painting) -> Kept:
        """Raises StorageFailed."""
        self.sweep()
        self._write(video)
        kept = self._kept[video.id] = Kept(video, call)
        return kept

    def __contains__(self, key: str) -> bool:
        return key in self._kept

    def get(self, key: str) -> Kept:
        """Raises NotFound."""
        self.sweep()
        kept = self._kept.get(key)
        if kept is None:
            raise NotFound(f"there is no video {key!r:.100}", param="video_id", code="video_not_found")
        return kept

    def page(self, after: str | None, limit: int, newest_first: bool) -> tuple[list[Video], bool]:
        """(jobs in the order in which they were made, whether there are more). Raises NotFound: `after` is none."""
        self.sweep()
        ordered = sorted(self._kept.values(), key=lambda kept: kept.video.created_at)  # stable: as they came
        found = [kept.video for kept in (reversed(ordered) if newest_first else ordered)]
        if after is not None:
            at = next((at for at, video in enumerate(found) if video.id == after), None)
            if at is None:
                raise NotFound(f"there is no video {after!r:.100}", param="after", code="video_not_found")
            found = found[at + 1 :]
        return found[:limit], len(found) > limit

    def complete(self, kept: Kept, size: int) -> None:
        """The film at `part` is whole. Raises StorageFailed: it is kept whole, with its job, or not at all."""
        video, now = kept.video, time.time()
        others = [one for one in self._kept.values() if one.size and one is not kept]
        others.sort(key=lambda one: one.video.completed_at or 0)
        total = size + sum(one.size for one in others)
        for one in others:
            if total <= self.max_bytes:
                break
            total -= one.size
            self.remove(one.video.id)
        try:
            os.replace(self.part(video.id), self.film(video.id))
        except OSError as error:
            raise StorageFailed(f"the film could not be written: {error.strerror}") from error
        video.status, video.progress = "completed", 100
        video.completed_at, video.expires_at = int(now), int(now + self._ttl)
        kept.size, kept.call = size, None
        try:
            self._write(video)
        except StorageFailed:
            video.progress = 99
            self._unlink(self.film(video.id))
            raise
        self.sweep()

    def fail(self, kept: Kept, code: str, message: str) -> None:
        video, now = kept.video, time.time()
        video.status, video.error = "failed", VideoError(code=code, message=message)
        video.completed_at, video.expires_at = int(now), int(now + self._ttl)
        kept.call, kept.size = None, 0
        with contextlib.suppress(StorageFailed):
            self._write(video)

    def remove(self, key: str) -> None:
        """End the job where it runs, and remove its files."""
        kept = self._kept.pop(key, None)
        if kept is None:
            return
        if kept.call is not None:
            kept.call.cancel()
        self._unlink(self.film(key), self.path / f"{key}.json")

    def drop_part(self, key: str) -> None:
        """What is left of a film that did not come to be."""
        self._unlink(self.part(key))

    def _unlink(self, *paths: Path) -> None:
        for path in paths:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)

    def sweep(self) -> None:
        """Forget what has expired, and the oldest of too many."""
        now = time.time()
        ended = [kept for kept in self._kept.values() if kept.video.expires_at is not None]
        ended.sort(key=lambda kept: kept.video.expires_at or 0)
        over = len(ended) - MAX_JOBS
        for at, kept in enumerate(ended):
            if at < over or (kept.video.expires_at or 0) <= now:
                self.remove(kept.video.id)
        self._arm([kept for kept in ended if kept.video.id in self._kept], now)

    def _arm(self, ended: list[Kept], now: float) -> None:
        """Sweep again when the next one expires, whether or not anybody asks."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if ended:
            loop = asyncio.get_running_loop()
            wait = min(max(1.0, (ended[0].video.expires_at or 0) - now), 86400.0)
            self._timer = loop.call_later(wait, self.sweep)
