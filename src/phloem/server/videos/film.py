"""Frames into an mp4 file, by PyAV (an optional package, whose wheels bring the codecs)."""

from __future__ import annotations

import contextlib
import importlib.util
import threading
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np

from phloem.core.errors import BadRequest, PhloemError, StorageFailed

if TYPE_CHECKING:
    from pathlib import Path

QUALITY = "18"  # x264's constant rate factor: what is lost is hardly seen
CODECS = ("libx264", "libopenh264", "mpeg4")


def check_codec() -> None:
    """Whether films can be written here. Raises BadRequest."""
    if importlib.util.find_spec("av") is None:
        raise BadRequest("films need PyAV on the server: pip install 'phloem[media]'", code="video_codec_missing")


class FilmWriter:
    """A file that grows by frames, in any thread; whatever comes after its end does nothing.

    Args:
        max_bytes: beyond which writing fails.

    Raises:
        PhloemError: from every call, where the disk is full or the file too large.
    """

    def __init__(self, path: Path, width: int, height: int, fps: float, max_bytes: int) -> None:
        import av

        self._path, self._size, self._most = path, (height, width, 3), max_bytes
        # A task that is cancelled leaves its thread behind: a file that is closed under an encoder ends the process.
        self._turn, self._ended = threading.Lock(), False
        self._frame: Any = av.VideoFrame
        name = next(name for name in CODECS if name in av.codecs_available)
        with _Told():
            self._file: Any = av.open(str(path), "w", format="mp4", options={"movflags": "faststart"})
            stream: Any = self._file.add_stream(name, rate=Fraction(fps).limit_denominator(1001))
            stream.width, stream.height = width, height
            # Colours at half the size, which all players know, need even sides.
            stream.pix_fmt = "yuv420p" if width % 2 == height % 2 == 0 or name != "libx264" else "yuv444p"
            if name == "libx264":
                stream.options = {"crf": QUALITY, "preset": "medium"}
        self._stream = stream

    def add(self, pixels: bytes) -> None:
        """The next frame: rows of red, green, blue, a byte each."""
        picture = np.frombuffer(pixels, np.uint8).reshape(self._size)
        with self._turn, _Told():
            if self._ended:
                return
            self._file.mux(self._stream.encode(self._frame.from_ndarray(picture, format="rgb24")))
            self._check()

    def close(self) -> int:
        """The end of the film; gives the file's bytes."""
        with self._turn, _Told():
            if not self._ended:
                self._file.mux(self._stream.encode(None))
                self._file.close()
                self._ended = True
            return self._check()

    def drop(self) -> None:
        """Give the file up; harmless when repeated."""
        with self._turn, contextlib.suppress(OSError, ValueError, RuntimeError):
            if not self._ended:
                self._ended = True
                self._file.close()
        with contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)

    def _check(self) -> int:
        # There is no file before the codec gives its first bytes.
        size = self._path.stat().st_size if self._path.exists() else 0
        if size > self._most:
            raise PhloemError(f"the film has more than the {self._most} bytes that are kept (--video-max-bytes)")
        return size


class _Told:
    """What a disk says, without where it is."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError):
            raise StorageFailed(f"the film could not be written: {error.strerror or type(error).__name__}") from error
