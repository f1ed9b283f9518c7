"""Qwen2.5-Omni and Qwen3-Omni: pictures and videos as Qwen2.5-VL's, sounds of any length."""

from __future__ import annotations

from typing import Any

import numpy as np

from phloem.multimodal import Facts, Picture, Processor
from phloem.multimodal._audio import HOP, RATE, WINDOW, log_mel
from phloem.multimodal.qwen_vl import QwenPictures, QwenVideos

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


def build(facts: Facts) -> dict[str, Processor]:
    third = facts.config.get("model_type", "").startswith("qwen3")
    sounds = PiecedSounds(facts) if third else LongSounds(facts)
    return {"image": QwenPictures(facts), "video": QwenVideos(facts), "audio": sounds}
