"""Qwen2.5-Omni and Qwen3-Omni: pictures and videos as Qwen2.5-VL's, sounds of any length."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from phloem.core.media import FOLDED, MINGLED
from phloem.multimodal import Facts, Picture, Processor
from phloem.multimodal._audio import HOP, RATE, WINDOW, log_mel
from phloem.multimodal.qwen_vl import QwenPictures, QwenVideos

if TYPE_CHECKING:
    from collections.abc import Sequence

    from phloem.multimodal._aside import Film

MOST_SOUND_SECONDS = 600.0  # of a video
SECONDS_TOGETHER = 2.0  # of a video in Qwen2.5-Omni, behind which its sound of these seconds stands
# Of Qwen3-Omni's sounds: frames of a piece, and its tokens; each convolution takes every other place.
SECOND, TOKENS, CONVOLUTIONS = 100, 13, 3


class LongSounds:
    def __init__(self, facts: Facts) -> None:
        audio: dict[str, Any] = facts.config.get("audio_config") or {}
        self.bands = int(audio.get("num_mel_bins", 128))
        self.mark = self.placeholder = facts.text_of(facts.config["audio_token_id"])
        ends = [facts.text_of(int(facts.config[f"audio_{end}_token_id"])) for end in ("start", "end")]
        self.inline = self.mark.join(ends)

    def make(self, source: Any, /) -> Picture:
        frames = -(-len(source) // HOP)
        states = (frames + 1) // 2
        if states < 2:
            raise ValueError(f"{len(source)} samples at {RATE} Hz are too short a sound")
        # Its last frames see the silence behind it.
        mel = log_mel(np.pad(source, (0, frames * HOP - len(source) + WINDOW)), self.bands)[:, :frames]
        pixels = np.ascontiguousarray(mel, dtype="<f4").view(np.uint8).reshape(1, self.bands, frames, 4)
        return Picture(pixels, (), self.mark, (states // 2,))


class PiecedSounds(LongSounds):
    """Of Qwen3-Omni: 13 tokens for each second, or fewer for what is left of one."""

    def make(self, source: Any, /) -> Picture:
        if len(source) <= WINDOW // 2:
            raise ValueError(f"{len(source)} samples at {RATE} Hz are too short a sound")
        mel = log_mel(source, self.bands)
        frames = mel.shape[1]
        whole, rest = divmod(frames, SECOND)
        for _ in range(CONVOLUTIONS):
            rest = (rest + 1) // 2
        pixels = np.ascontiguousarray(mel, dtype="<f4").view(np.uint8).reshape(1, self.bands, frames, 4)
        return Picture(pixels, (), self.mark, (whole * TOKENS + rest,))


class OmniVideos(QwenVideos):
    """Videos, with their sound among the frames where that is asked for."""

    def __init__(self, facts: Facts, sounds: LongSounds) -> None:
        super().__init__(facts)
        self.sounds, self.by_time = sounds, _third(facts)
        self.chunk = int(self.per_second * SECONDS_TOGETHER)

    def make(self, source: Film, /) -> Picture:
        picture = super().make(source)
        if not source.wanted.sound:
            return picture
        sound = self.sounds.make(source.sound(MOST_SOUND_SECONDS))
        (count,), each = sound.runs, picture.runs[0] // len(picture.times)
        times, heard = np.repeat(picture.times, each).tolist(), list(range(count))
        order = _by_time(times, heard) if self.by_time else _by_chunks(times, heard, self.chunk)
        first, last = self.sounds.inline.split(self.sounds.mark)
        text = "".join(self.sounds.mark if kind else self.mark for kind, _ in order)
        runs = [tuple(count for kind, count in order if kind == own) for own in (0, 1)]
        mingled = MINGLED if self.by_time else FOLDED
        beside = replace(sound, runs=runs[1], times=tuple(heard), mingled=mingled)
        return replace(picture, text=f"{first}{text}{last}", runs=runs[0], mingled=mingled, beside=(beside, b""))


def _by_time(seen: Sequence[float], heard: Sequence[int]) -> list[tuple[int, int]]:
    """Runs of a video's tokens (0) and its sound's (1), by their times; a frame before a sound of the same time."""
    times = sorted([(time, 0) for time in seen] + [(time, 1) for time in heard])
    return [(kind, len(list(run))) for kind, run in itertools.groupby(kind for _, kind in times)]


def _by_chunks(seen: Sequence[int], heard: Sequence[int], chunk: int) -> list[tuple[int, int]]:
    """Of each chunk of time first the video's, then the sound's."""
    parts = itertools.zip_longest(_chunks(seen, chunk), _chunks(heard, chunk), fillvalue=0)
    flat = [(kind, count) for pair in parts for kind, count in enumerate(pair) if count]
    return [(kind, sum(n for _, n in run)) for kind, run in itertools.groupby(flat, key=lambda one: one[0])]


def _chunks(times: Sequence[int], chunk: int) -> list[int]:
    """How many of rising times each has. A time that is further than a whole chunk ends one alone."""
    found, first, border = list[int](), 0, chunk
    for at, time in enumerate(times):
        if time >= border:
            found.append(at - first)
            first, border = at, border + chunk
    return [*found, len(times) - first]


def _third(facts: Facts) -> bool:
    return facts.config.get("model_type", "").startswith("qwen3")


def build(facts: Facts) -> dict[str, Processor]:
    sounds = PiecedSounds(facts) if _third(facts) else LongSounds(facts)
    return {"image": QwenPictures(facts), "video": OmniVideos(facts, sounds), "audio": sounds}
