"""Sound files to the log-mel features that models hear. Everything here is work for a thread beside the event loop.

WAV is read by the standard library, or like FLAC, OGG, MP3 and AIFF by `soundfile` (libsndfile), an optional package.
"""

from __future__ import annotations

import io
import math
import re
import wave
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from phloem.core.errors import BadRequest

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Samples = NDArray[np.float32]

RATE = 16_000  # samples a second of what models hear
WINDOW, HOP = 400, 160  # samples of a frame, and from one to the next: 100 frames a second
FRAMES_PER_SECOND = RATE // HOP
MOST_CHANNELS = 16
RATES = (1_000, 384_000)
BLOCK_SECONDS = 60  # of a file that are decoded and resampled at a time
BLOCK_FRAMES = 3_000  # of features that are computed at a time
ZEROS = 16  # zero crossings of the resampling filter on either side
# The first bytes of the files that are decoded; anything else is refused before a decoder sees it.
_MAGIC = {b"RIFF": "wav", b"RF64": "wav", b"fLaC": "flac", b"OggS": "ogg", b"ID3": "mp3", b"FORM": "aiff"}
KNOWN = "wav, flac, ogg (Vorbis, Opus), mp3, aiff"


@dataclass(frozen=True, slots=True)
class Heard:
    """What a model is given of a file. `mel`: log-mel features, float32 [bands, frames]; a file shorter than a window
    has been filled up with silence. `frames`: of its own sound."""

    mel: NDArray[np.float32]
    frames: int
    seconds: float


def hear(data: bytes, bands: int, window: int, most_seconds: float, param: str = "file") -> Heard:
    """A sound file's features.

    Args:
        bands: of the mel scale, 80 or 128.
        window: frames that the model hears at a time.
        most_seconds: longer files are refused.
        param: the field that the file came in.

    Raises:
        BadRequest: the file is empty, broken, too long, of an unknown format, or has samples that are not numbers.
    """
    samples = decode(data, most_seconds, param)
    if not len(samples):
        raise BadRequest(f"{param}: the audio has no samples", param=param, code="invalid_audio")
    frames = -(-len(samples) // HOP)
    short = window * HOP - len(samples)
    if short > 0:
        samples = np.concatenate([samples, np.zeros(short, np.float32)])
    return Heard(log_mel(samples, bands), frames, frames / FRAMES_PER_SECOND)


def kind_of(data: bytes) -> str | None:
    """The format of a file, by its first bytes."""
    for magic, kind in _MAGIC.items():
        if data.startswith(magic):
            return kind
    frame = len(data) > 1 and data[0] == 0xFF and data[1] & 0xE6 == 0xE2  # an MPEG frame of layer 3
    return "mp3" if frame else None


def decode(data: bytes, most_seconds: float, param: str = "file") -> Samples:
    """All samples, as one channel of 16 kHz in [-1, 1]. Raises BadRequest, as `hear`."""
    kind = kind_of(data)
    if kind is None:
        what = "the file is empty" if not data else "the file is of no known format"
        raise BadRequest(f"{param}: {what}; known: {KNOWN}", param=param, code="invalid_audio")
    try:
        import soundfile  # optional: extra `audio`
    except ImportError:
        if kind != "wav":
            text = f"{param}: reading {kind} needs the package soundfile (pip install 'phloem[audio]'); wav does not"
            raise BadRequest(text, param=param, code="not_supported") from None
        return _plain_wav(data, most_seconds, param)
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            return _read(file, most_seconds, param)
    except (soundfile.SoundFileError, TypeError, ValueError, OverflowError) as error:
        raise _broken(kind, error, param) from None


def _broken(kind: str, error: Exception, param: str) -> BadRequest:
    told = re.sub(r"<_io\.BytesIO object[^>]*>", "the file", str(error))
    reason = told.splitlines()[0:1] or [type(error).__name__]
    return BadRequest(
        f"{param}: this {kind} file cannot be decoded: {reason[0]:.200}", param=param, code="invalid_audio"
    )


def _check(rate: int, channels: int, frames: int, most_seconds: float, param: str) -> None:
    low, high = RATES
    if not low <= rate <= high:
        raise BadRequest(
            f"{param}: a sampling rate of {rate} Hz; {low} to {high} are read", param=param, code="invalid_audio"
        )
    if not 1 <= channels <= MOST_CHANNELS:
        raise BadRequest(
            f"{param}: {channels} channels; at most {MOST_CHANNELS} are read", param=param, code="invalid_audio"
        )
    if frames > most_seconds * rate:
        raise BadRequest(
            f"{param}: more than {most_seconds:g} s of audio (max_audio_seconds)", param=param, code="audio_too_long"
        )


def _read(file: Any, most_seconds: float, param: str) -> Samples:
    """Block by block: what a header says of the length counts for nothing but an early refusal."""
    rate = int(file.samplerate)
    _check(rate, int(file.channels), max(0, int(file.frames)), most_seconds, param)
    parts: list[Samples] = []
    read = 0
    while True:
        block: Any = file.read(BLOCK_SECONDS * rate, dtype="float32", always_2d=True)
        read += len(block)
        _check(rate, 1, read, most_seconds, param)
        if len(block):
            parts.append(_mono(block, param))
        if len(block) < BLOCK_SECONDS * rate:
            break
    return resampled(np.concatenate(parts) if parts else np.zeros(0, np.float32), rate)


def _mono(block: NDArray[Any], param: str) -> Samples:
    mixed = block[:, 0] if block.shape[1] == 1 else block.mean(1, dtype=np.float32)
    if not np.isfinite(mixed).all():
        raise BadRequest(f"{param}: the audio has samples that are not numbers", param=param, code="invalid_audio")
    return np.ascontiguousarray(np.clip(mixed, -1, 1))


def _plain_wav(data: bytes, most_seconds: float, param: str) -> Samples:
    try:
        with wave.open(io.BytesIO(data)) as file:
            rate, channels, width = file.getframerate(), file.getnchannels(), file.getsampwidth()
            _check(rate, channels, file.getnframes(), most_seconds, param)
            if width > 4:
                raise wave.Error(f"samples of {width} bytes")
            raw = file.readframes(file.getnframes())
    except (wave.Error, EOFError, RuntimeError) as error:  # the last: a chunk ends before it begins
        raise _broken("wav", error, param) from None
    raw = raw[: len(raw) // (width * channels) * width * channels]
    if width == 1:
        whole = (np.frombuffer(raw, np.uint8).astype(np.float32) - 128) / 128
    elif width == 3:
        padded = np.zeros((len(raw) // 3, 4), np.uint8)
        padded[:, 1:] = np.frombuffer(raw, np.uint8).reshape(-1, 3)
        whole = padded.view("<i4")[:, 0].astype(np.float32) / 2**31
    else:
        whole = np.frombuffer(raw, f"<i{width}").astype(np.float32) / 2 ** (8 * width - 1)
    return resampled(_mono(whole.reshape(-1, channels), param), rate)


def resampled(samples: Samples, rate: int) -> Samples:
    """At 16 kHz, by a windowed sinc (Kaiser) at the lower of the two bandwidths."""
    if rate == RATE or not len(samples):
        return samples
    common = math.gcd(rate, RATE)
    up, down = RATE // common, rate // common
    narrow = min(1.0, RATE / rate) * 0.95  # a transition band below the Nyquist frequency
    half = math.ceil(ZEROS / narrow)
    count = len(samples) * up // down
    padded = np.concatenate([np.zeros(half, np.float32), samples, np.zeros(half + down, np.float32)])
    out = np.empty(count, np.float32)
    windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * half)
    starts, parts = np.divmod(np.arange(min(up, count)) * down, up)
    # Taps of each phase at the distances of the input samples start - half + 1 .. start + half from the output.
    distance = np.arange(1 - half, half + 1) - (parts / up)[:, None]
    taps = np.sinc(narrow * distance) * _kaiser(distance / half)
    taps = (taps / taps.sum(1, keepdims=True)).astype(np.float32)
    for phase, start in enumerate(starts.tolist()):
        out[phase::up] = windows[start + 1 :: down][: -(-(count - phase) // up)] @ taps[phase]
    return np.clip(out, -1, 1)


def _kaiser(x: NDArray[np.float64], beta: float = 9.0) -> NDArray[np.float64]:
    return np.i0(beta * np.sqrt(np.clip(1 - x * x, 0, None))) / np.i0(beta)


def log_mel(samples: Samples, bands: int) -> NDArray[np.float32]:
    """Log-mel features [bands, len(samples) // 160], scaled to about [-1, 1] (Radford et al., 2022).

    Frames of 25 ms around every 10 ms; log10 of the energy in each band, nothing more than 8 below the loudest.
    """
    half, filters = WINDOW // 2, mel_filters(bands)
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(WINDOW) / WINDOW)
    padded = np.pad(samples, half, "reflect")
    frames = len(samples) // HOP
    found = np.empty((bands, frames), np.float32)
    windows = np.lib.stride_tricks.sliding_window_view(padded, WINDOW)[::HOP]
    for start in range(0, frames, BLOCK_FRAMES):
        spectrum = np.fft.rfft(windows[start : min(start + BLOCK_FRAMES, frames)] * hann)
        power = spectrum.real**2 + spectrum.imag**2
        found[:, start : start + len(power)] = np.log10(np.maximum(power @ filters, 1e-10)).T
    np.maximum(found, found.max() - 8.0, out=found)
    found += 4.0
    found /= 4.0
    return found


@lru_cache(4)
def mel_filters(bands: int) -> NDArray[np.float64]:
    """[201 frequencies, bands]: triangles on Slaney's mel scale from 0 to 8 kHz, each of area 1 (times 2 / its width).

    The scale is linear to 1 kHz and logarithmic above (Slaney, Auditory Toolbox, 1998).
    """
    edges = _hertz(np.linspace(0.0, _mel(RATE / 2), bands + 2))
    frequencies = np.linspace(0, RATE / 2, WINDOW // 2 + 1)[:, None]
    rising = (frequencies - edges[:-2]) / np.diff(edges)[:-1]
    falling = (edges[2:] - frequencies) / np.diff(edges)[1:]
    return np.maximum(0, np.minimum(rising, falling)) * (2 / (edges[2:] - edges[:-2]))


_STEP = math.log(6.4) / 27  # of the logarithmic part; 1 kHz is 15 mel
_LINEAR = 3 / 200


def _mel(hertz: float) -> float:
    return 15 + math.log(hertz / 1000) / _STEP if hertz >= 1000 else hertz * _LINEAR


def _hertz(mel: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.where(mel >= 15, 1000 * np.exp(_STEP * (mel - 15)), mel / _LINEAR)
