"""A tiny model of speech with the tokens of a real one, and sounds."""

from __future__ import annotations

import io
import json
import wave
from pathlib import Path
from typing import Any

import numpy as np

from phloem.testing.checkpoints import VOCAB, tiny_checkpoint

SECONDS = 1.0  # that the tiny model hears at a time
NAMES = [
    *("<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|de|>", "<|translate|>", "<|transcribe|>"),
    *("<|startofprev|>", "<|nospeech|>", "<|notimestamps|>"),
]
END, START, ENGLISH, GERMAN = range(VOCAB, VOCAB + 4)
PLAIN = VOCAB + len(NAMES) - 1
FIRST = PLAIN + 1  # of 51 timestamps
SIZE = FIRST + 51


def tiny_whisper(path: Path, **more: Any) -> Path:
    """A random checkpoint that knows two languages."""
    sizes = {"vocab_size": SIZE, "eos_token_id": END, "decoder_start_token_id": START, "bos_token_id": END}
    tiny_checkpoint("whisper", path, **sizes, **more)
    from tokenizers import AddedToken, Tokenizer

    tokenizer: Any = Tokenizer.from_file(str(path / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in NAMES])
    tokenizer.save(str(path / "tokenizer.json"))
    assert tokenizer.token_to_id("<|endoftext|>") == END
    generation = {
        "decoder_start_token_id": START,
        "eos_token_id": END,
        "no_timestamps_token_id": PLAIN,
        "lang_to_id": {"<|en|>": ENGLISH, "<|de|>": GERMAN},
        "task_to_id": {"translate": VOCAB + 4, "transcribe": VOCAB + 5},
        "is_multilingual": True,
        "suppress_tokens": [0, 1, 2, 3],
        "begin_suppress_tokens": [END],
        "max_initial_timestamp_index": 10,
    }
    (path / "generation_config.json").write_text(json.dumps(generation))
    return path


def sound(seconds: float, rate: int = 16_000, pitch: float = 440.0) -> np.ndarray[Any, np.dtype[np.float32]]:
    """A tone that swells and fades."""
    at = np.arange(int(seconds * rate)) / rate
    return (0.4 * np.sin(2 * np.pi * pitch * at) * np.abs(np.sin(3 * at))).astype(np.float32)


def wav(samples: np.ndarray[Any, Any], rate: int = 16_000, channels: int = 1) -> bytes:
    """A PCM file of 16 bits; every channel the same."""
    with io.BytesIO() as file:
        with wave.open(file, "wb") as out:
            out.setnchannels(channels)
            out.setsampwidth(2)
            out.setframerate(rate)
            out.writeframes(np.repeat((samples * 32767).astype("<i2"), channels).tobytes())
        return file.getvalue()
