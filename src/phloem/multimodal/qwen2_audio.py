"""Qwen2-Audio: sounds of up to a window of log-mel features, each token of four frames."""

from __future__ import annotations

from typing import Any

import numpy as np

from phloem.multimodal import Facts, Picture, Processor
from phloem.multimodal._audio import HOP, RATE, log_mel


class WindowedSounds:
    def __init__(self, facts: Facts) -> None:
        audio: dict[str, Any] = facts.config.get("audio_config") or {}
        self.bands = int(audio.get("num_mel_bins", 128))
        self.frames = 2 * int(audio.get("max_source_positions", 1500))
        self.mark = self.placeholder = facts.text_of(facts.config["audio_token_id"])
        first, last = (f"<|audio_{end}|>" for end in ("bos", "eos"))
        self.inline = str(facts.more.get("audio_bos_token", first)) + self.mark
        self.inline += str(facts.more.get("audio_eos_token", last))

    def make(self, source: Any, /) -> Picture:
        frames = -(-len(source) // HOP)
        if frames > self.frames:
            most = self.frames * HOP / RATE
            raise ValueError(f"{len(source) / RATE:.2f} s of sound; this model hears {most:g} s at a time")
        states = (frames + 1) // 2
        if states < 2:
            raise ValueError(f"{len(source)} samples at {RATE} Hz are too short a sound")
        mel = log_mel(np.pad(source, (0, self.frames * HOP - len(source))), self.bands)
        # As many frames as these states depend on.
        needed = np.ascontiguousarray(mel[:, : min(self.frames, 2 * states + 2)], dtype="<f4")
        pixels = needed.view(np.uint8).reshape(1, self.bands, -1, 4)
        return Picture(pixels, (), self.mark, (states // 2,), extra=(states,))


def build(facts: Facts) -> dict[str, Processor]:
    return {"audio": WindowedSounds(facts)}
