"""A film from its request to its file."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from typing import TYPE_CHECKING

from phloem.client.call import ClientGone
from phloem.core.errors import OutOfMemory, PhloemError
from phloem.server.videos.film import FilmWriter, check_codec
from phloem.server.videos.write import Video

if TYPE_CHECKING:
    from phloem.client.pictures import Painting
    from phloem.core.messages import Draw, Painted
    from phloem.server.door import Door
    from phloem.server.videos.store import Kept, VideoStore

log = logging.getLogger("phloem.server")
ADMIT_SECONDS = 10.0  # an engine in the middle of a long step answers after it


async def begin(door: Door, draw: Draw, fps: float, seconds: str) -> Video:
    """A job for this film, whose size and length are said, once the engine has taken it up.

    Raises:
        BadRequest: the model does not make such a film.
    """
    check_codec()
    call = door.client.draw([draw])
    call.background = True
    try:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(ADMIT_SECONDS):
                await anext(call)
        video = Video(
            id=draw.id,
            model=door.info.served_model_name,
            created_at=int(time.time()),
            prompt=draw.prompt,
            size=f"{draw.width}x{draw.height}",
            seconds=seconds,
            seed=draw.seed,
            num_frames=draw.frames,
            fps=fps,
        )
        kept = door.videos.add(video, call)
    except BaseException:
        call.cancel()
        raise
    task = asyncio.create_task(_work(door.videos, kept, call))
    door.videos.tasks.add(task)
    task.add_done_callback(door.videos.tasks.discard)
    return video


async def _work(store: VideoStore, kept: Kept, call: Painting) -> None:
    key = kept.video.id
    made = _Made(store, kept)
    try:
        async for told in call:
            await made.take(told)
        if key in store:
            store.complete(kept, made.size)
    except PhloemError as error:
        if key in store:  # else it was deleted, which ended the call
            code = "out_of_memory" if isinstance(error, OutOfMemory) else error.code or error.kind
            why = "the job was ended by the server" if isinstance(error, ClientGone) else error.message
            store.fail(kept, code, why)
    except Exception as error:
        log.exception("video %s failed", key)
        if key in store:
            store.fail(kept, "internal_error", f"internal error: {type(error).__name__}")
    finally:
        call.cancel()
        made.drop()


class _Made:
    """The file of a job, as it comes to be."""

    def __init__(self, store: VideoStore, kept: Kept) -> None:
        self._store, self._video = store, kept.video
        self._writer: FilmWriter | None = None
        self.size = 0

    async def take(self, told: Painted) -> None:
        video, path = self._video, self._store.part(self._video.id)
        if told.frame >= 0:
            if self._writer is None:
                size = told.width, told.height
                self._writer = await asyncio.to_thread(FilmWriter, path, *size, video.fps, self._store.max_bytes)
            await asyncio.to_thread(self._writer.add, told.pixels)
        elif told.done:
            if self._writer is None:
                raise PhloemError("the model gave no frames")
            self.size = await asyncio.to_thread(self._writer.close)
            self._writer = None
        elif told.step:
            video.status, video.progress = "in_progress", min(99, 100 * told.step // max(1, told.steps))

    def drop(self) -> None:
        if self._writer is not None:
            self._writer.drop()
        self._store.drop_part(self._video.id)
