"""Frames of a video file, decoded by PyAV (an optional package). Work for a process of its own (`_aside.py`).

A file is recognised by its first bytes and opened by that one demuxer, from memory: nothing in it can name another file
or an address. Its packets are counted without decoding; then those frames alone are decoded that are asked for, from
the nearest key frame before each, until a deadline.
"""

from __future__ import annotations

import bisect
import importlib.util
import io
import itertools
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from phloem.core.errors import BadRequest
from phloem.multimodal._audio import RATE
from phloem.multimodal._pixels import MOST_PIXELS, as_array, resized

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

WHOLE_SECONDS = 20.0  # of work for one video
MOST_SECONDS = 4 * 3600.0  # that a video is long
MOST_FRAMES = 768  # that a model is shown
KNOWN = "mp4, mov, webm, mkv, avi, gif, mpeg-ts"


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a client asks for, where it says so: so many frames, or so many of each second; its sound."""

    num_frames: int | None = None
    fps: float | None = None
    sound: bool = False  # that it has is heard as well


def available() -> bool:
    """Whether videos can be read here."""
    return importlib.util.find_spec("av") is not None


def kind_of(data: bytes) -> str | None:
    """The demuxer of a file, by its first bytes."""
    if data[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"):
        return "mp4"
    if data.startswith(b"\x1aE\xdf\xa3"):
        return "matroska"
    if data.startswith(b"RIFF") and data[8:12] == b"AVI ":
        return "avi"
    if data.startswith((b"GIF87a", b"GIF89a")):
        return "gif"
    return "mpegts" if data[:1] == b"G" and data[188:189] == b"G" else None


class _BehindError(Exception):
    """A frame that was looked for has been passed."""


class Video:
    """A file whose packets were counted. `total`: its frames; `fps`: of a second; `size`: width and height, upright.

    Raises:
        BadRequest: it is no video, is broken, too large or too long, or takes too long to read.
    """

    def __init__(self, data: bytes, where: str, wanted: Wanted) -> None:
        self.wanted, self.where = wanted, where
        self._data, self._deadline = data, time.monotonic() + WHOLE_SECONDS
        kind = kind_of(data)
        if kind is None:
            raise BadRequest(f"{where}: no video of a known kind ({KNOWN})", param=where, code="bad_video")
        self._kind = kind
        self.size = (0, 0)
        self._times: list[int] = []  # of frames, in the order in which they are shown
        self._keys: list[int] = []
        self.fps = self._guarded(self._count)

    @property
    def total(self) -> int:
        return len(self._times)

    def frames(self, indices: Sequence[int], width: int, height: int, settings: dict[str, Any]) -> NDArray[np.uint8]:
        """[frames, height, width, 3] of these frames, in rising order, resized as `settings` say."""

        def fit(image: Any) -> NDArray[np.uint8]:
            return as_array(resized(image, width, height, settings))

        try:
            found = self._guarded(lambda: list(self._decoded(indices, fit, self._kind != "mpegts")))
        except _BehindError:
            found = self._guarded(lambda: list(self._decoded(indices, fit, False)))
        if len(found) != len(indices):
            raise BadRequest(f"{self.where}: the video ends early", param=self.where, code="bad_video")
        return np.stack(found)

    def sound(self, most_seconds: float) -> NDArray[np.float32]:
        """All samples of the first sound track, as one channel of 16 kHz in [-1, 1]."""
        return self._guarded(lambda: self._heard(most_seconds))

    def _heard(self, most_seconds: float) -> NDArray[np.float32]:
        import av  # optional: extra `media`

        with self._open() as container:
            if not container.streams.audio:
                text = f"{self.where}: the video has no sound (use_audio_in_video)"
                raise BadRequest(text, param=self.where, code="bad_video")
            stream = container.streams.audio[0]
            stream.codec_context.thread_count = 1
            resampler = av.AudioResampler("flt", "mono", RATE)
            parts: list[NDArray[np.float32]] = []
            count = 0
            for frame in itertools.chain(container.decode(stream), [None]):
                self._in_time()
                for one in resampler.resample(frame):
                    parts.append(one.to_ndarray().reshape(-1).astype(np.float32))
                    count += len(parts[-1])
                if count > most_seconds * RATE:
                    text = f"{self.where}: the video's sound is longer than {most_seconds:g} s"
                    raise BadRequest(text, param=self.where, code="too_large")
        samples = np.concatenate(parts) if parts else np.zeros(0, np.float32)
        if not np.isfinite(samples).all():
            raise BadRequest(f"{self.where}: samples that are not numbers", param=self.where, code="bad_video")
        return np.clip(samples, -1, 1)

    def _guarded(self, work: Callable[[], Any]) -> Any:
        where = self.where
        try:
            return work()
        except (BadRequest, MemoryError, _BehindError):
            raise
        except Exception as error:  # decoders raise whatever they like for broken files
            told = getattr(error, "strerror", None) or str(error)  # of PyAV, without its calls
            reason = told.splitlines()[:1] or [type(error).__name__]
            message = f"{where}: the video is broken: {reason[0]:.200}"
            raise BadRequest(message, param=where, code="bad_video") from None

    def _in_time(self) -> None:
        if time.monotonic() > self._deadline:
            message = f"{self.where}: reading the video takes more than {WHOLE_SECONDS:g} s"
            raise BadRequest(message, param=self.where, code="too_large")

    def _open(self) -> Any:
        import av  # optional: extra `media`

        return av.open(io.BytesIO(self._data), format=self._kind)

    def _stream(self, container: Any) -> Any:
        if not container.streams.video:
            raise BadRequest(f"{self.where}: the file has no video", param=self.where, code="bad_video")
        stream = container.streams.video[0]
        context = stream.codec_context
        width, height = context.width, context.height
        if width < 1 or height < 1:
            raise BadRequest(f"{self.where}: the video is broken: no size", param=self.where, code="bad_video")
        if width * height > MOST_PIXELS:
            text = f"{self.where}: {width} x {height} pixels are more than {MOST_PIXELS}"
            raise BadRequest(text, param=self.where, code="too_large")
        # Also of frames that say otherwise later on.
        context.options = {"max_pixels": str(MOST_PIXELS)}
        context.thread_count = 1
        return stream

    def _count(self) -> float:
        with self._open() as container:
            stream = self._stream(container)
            self.size = stream.codec_context.width, stream.codec_context.height
            last = 0
            for packet in container.demux(stream):
                self._in_time()
                if packet.size == 0:
                    continue
                at = packet.pts if packet.pts is not None else packet.dts if packet.dts is not None else last
                last = at + max(1, packet.duration or 1)
                self._times.append(at)
                if packet.is_keyframe:
                    self._keys.append(at)
            self._times.sort()
            self._keys.sort()
            if not self._times:
                raise BadRequest(f"{self.where}: the video has no frames", param=self.where, code="bad_video")
            seconds = float((max(last, self._times[-1] + 1) - self._times[0]) * stream.time_base)
            if not 0 < seconds <= MOST_SECONDS:
                text = f"{self.where}: the video is {seconds:g} s long; at most {MOST_SECONDS:g} are read"
                raise BadRequest(text, param=self.where, code="too_large")
            rate = stream.average_rate
            for frame in container.decode(stream) if self._sought(container, stream, self._keys[:1]) else ():
                if frame.rotation % 180:
                    self.size = self.size[::-1]
                break
        return float(rate) if rate else len(self._times) / seconds

    @staticmethod
    def _sought(container: Any, stream: Any, keys: list[int]) -> bool:
        if keys:
            container.seek(keys[0], stream=stream)
        return bool(keys)

    def _decoded(
        self, indices: Sequence[int], fit: Callable[[Any], NDArray[np.uint8]], seeks: bool
    ) -> Iterator[NDArray[np.uint8]]:
        """Raises _BehindError where seeking leads behind the frame that was looked for: containers without an index."""
        with self._open() as container:
            stream = self._stream(container)
            at, source, frame = -1, container.decode(stream), None
            made: tuple[int, NDArray[np.uint8]] | None = None
            for index in indices:
                wanted = self._times[index]
                key = bisect.bisect_right(self._keys, wanted) - 1
                sought = seeks and key > 0 and self._keys[key] > at
                if sought:
                    container.seek(self._keys[key], stream=stream)
                    source, frame = container.decode(stream), None
                while frame is None or (frame.pts is not None and frame.pts < wanted):
                    self._in_time()
                    following = next(source, None)
                    if following is None:
                        break
                    frame = following
                    at = frame.pts if frame.pts is not None else wanted
                if frame is None:
                    return
                if sought and at > wanted:
                    raise _BehindError
                if made is None or made[0] != at:
                    made = at, fit(_upright(frame))
                yield made[1]


def _upright(frame: Any) -> Any:
    image = frame.to_image()
    turned = frame.rotation % 360
    return image.rotate(turned, expand=True) if turned else image
