"""Videos and documents are opened in processes of their own, under limits: their decoders know none.

A video of a kilobyte may have an index of gigabytes, a page that many lines take hours. What is sent back is pixels.
"""

from __future__ import annotations

import contextlib
import queue
import time
from typing import TYPE_CHECKING, Any

import numpy as np

from phloem.core.errors import BadRequest
from phloem.multimodal._pages import Document
from phloem.multimodal._video import Video, Wanted
from phloem.utils.confined import Confined, hello, serve

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Sequence

    from numpy.typing import NDArray

WHOLE_SECONDS = 20.0  # of work for one file
MEMORY = 2 << 30  # bytes beyond those of the libraries
_MARGIN = 5.0  # seconds that a video's own deadline has before its process is ended


class Aside:
    """Processes for files of one kind; as many as there are threads that ask for them."""

    def __init__(self, kind: str, count: int) -> None:
        self._kind = kind
        self._all = [Confined("phloem.multimodal._aside", {"memory": MEMORY}) for _ in range(count)]
        self._free: queue.SimpleQueue[Confined] = queue.SimpleQueue()
        for child in self._all:
            self._free.put(child)

    @contextlib.contextmanager
    def opened(self, data: bytes, where: str, most: int = 0, wanted: Wanted | None = None) -> Generator[Opened]:
        """A file in one of them; `most`: pages of a document, `wanted`: of a video. Raises BadRequest."""
        child = self._free.get()
        try:
            yield Opened(child, self._kind, data, where, most, wanted or Wanted())
        finally:
            self._free.put(child)

    def close(self) -> None:
        for child in self._all:
            child.kill()
        with contextlib.suppress(queue.Empty):
            while True:
                self._free.get_nowait().close()


class Opened:
    """A file in a process of its own."""

    def __init__(self, child: Confined, kind: str, data: bytes, where: str, most: int, wanted: Wanted) -> None:
        self._child, self._kind, self._where = child, kind, where
        self._left = WHOLE_SECONDS + (_MARGIN if kind == "video" else 0)
        self.wanted = wanted
        if not child.start():
            raise BadRequest(f"{where}: what reads {kind}s did not start", param=where, code=f"bad_{kind}")
        job = {"kind": kind, "data": data, "where": where, "most": most, "wanted": (wanted.num_frames, wanted.fps)}
        self.about = self._ask(job)

    def pages(self) -> Iterator[Any]:
        """Of a document: Pillow images in RGB."""
        from PIL import Image  # optional: extra `vision`

        for number in range(self.about["count"]):
            made = self._ask({"page": number})
            yield Image.frombytes("RGB", tuple(made["size"]), made["pixels"])

    def film(self) -> Film:
        return Film(self, self.about["total"], self.about["fps"], tuple(self.about["size"]), self.wanted)

    def frames(self, indices: Sequence[int], width: int, height: int, settings: dict[str, Any]) -> NDArray[np.uint8]:
        by = {"resample": settings.get("resample")}
        made = self._ask({"indices": list(indices), "width": width, "height": height, "settings": by})
        return np.frombuffer(made["pixels"], np.uint8).reshape(len(indices), height, width, 3)

    def sound(self, most_seconds: float) -> NDArray[np.float32]:
        return np.frombuffer(self._ask({"seconds": most_seconds})["samples"], np.float32)

    def _ask(self, job: dict[str, Any]) -> dict[str, Any]:
        answer = self._child.ask(job, self._left)
        if answer is None:
            reason = f"reading the {self._kind} takes more than {WHOLE_SECONDS:g} s or {MEMORY >> 30} GiB"
            raise BadRequest(f"{self._where}: {reason}", param=self._where, code="too_large")
        self._left = max(0.0, self._left - answer["seconds"])
        if "error" in answer:
            raise BadRequest(answer["error"], param=self._where, code=answer["code"])
        return answer


class Film:
    """A video that was opened: `_video.Video` in another process."""

    def sound(self, most_seconds: float) -> NDArray[np.float32]:
        """Its first sound track, as `_audio.decode`. Raises BadRequest."""
        return self._opened.sound(most_seconds)

    def __init__(self, opened: Opened, total: int, fps: float, size: tuple[int, int], wanted: Wanted) -> None:
        self._opened, self.total, self.fps, self.size, self.wanted = opened, total, fps, size, wanted

    def frames(self, indices: Sequence[int], width: int, height: int, settings: dict[str, Any]) -> NDArray[np.uint8]:
        """[frames, height, width, 3] of these frames, in rising order, resized as `settings` say. Raises BadRequest."""
        return self._opened.frames(indices, width, height, settings)


# in the child


class _Child:
    def __init__(self) -> None:
        self._video: Video | None = None
        self._document: Document | None = None
        self._where = ""

    def answer(self, job: dict[str, Any]) -> dict[str, Any]:
        began = time.monotonic()
        try:
            made = self._made(job)
        except BadRequest as error:
            made = {"error": error.message, "code": error.code}
        except MemoryError:
            what = f"{self._where}: reading it takes more than {MEMORY >> 30} GiB"
            made = {"error": what, "code": "too_large"}
        return {**made, "seconds": time.monotonic() - began}

    def _made(self, job: dict[str, Any]) -> dict[str, Any]:
        if "kind" in job:
            self._video = self._document = None  # the last one's
            self._where = job["where"]
            if job["kind"] == "document":
                self._document = Document(job["data"], job["where"], job["most"])
                return {"count": self._document.count}
            video = self._video = Video(job["data"], job["where"], Wanted(*job["wanted"]))
            return {"total": video.total, "fps": video.fps, "size": video.size}
        if "page" in job:
            assert self._document is not None
            image = self._document.drawn(job["page"])
            return {"size": image.size, "pixels": image.tobytes()}
        assert self._video is not None
        if "seconds" in job:
            return {"samples": self._video.sound(job["seconds"]).tobytes()}
        frames = self._video.frames(job["indices"], job["width"], job["height"], job["settings"])
        return {"pixels": frames.tobytes()}


def main() -> None:
    about = hello()
    if about is not None:
        with contextlib.suppress(ImportError):
            import av as av  # before memory is limited
        with contextlib.suppress(ImportError):
            import pypdfium2 as pypdfium2
        serve(_Child().answer, int(about["memory"]), int(WHOLE_SECONDS + 2 * _MARGIN))
