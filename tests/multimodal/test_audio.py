"""Sound files and their features, against transformers' extractor; broken and hostile files."""

from __future__ import annotations

import io
import sys
from typing import Any

import numpy as np
import pytest
from speech_support import sound, wav

from phloem.core.errors import BadRequest
from phloem.multimodal._audio import RATE, decode, hear, kind_of, log_mel, mel_filters, resampled

soundfile: Any = pytest.importorskip("soundfile", reason="soundfile, of the extra phloem[audio], is not installed")


def packed(samples: Any, rate: int, kind: str, subtype: str | None = None) -> bytes:
    with io.BytesIO() as file:
        soundfile.write(file, samples, rate, format=kind, subtype=subtype)
        return file.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize(("bands", "seconds"), [(80, 30.0), (128, 30.0), (80, 4.27), (80, 41.003)])
def test_features_are_those_of_the_extractor(bands: int, seconds: float) -> None:
    from transformers import WhisperFeatureExtractor

    noise = np.random.default_rng(3).standard_normal(int(seconds * RATE)).astype(np.float32) * 0.02
    samples = noise + sound(seconds + 1)[: len(noise)]
    extract = WhisperFeatureExtractor(feature_size=bands)
    options: dict[str, Any] = {"sampling_rate": RATE, "return_tensors": "np", "truncation": False}
    theirs = extract(samples, padding="longest", **options).input_features[0]
    ours = log_mel(samples, bands)
    assert ours.dtype == np.float32
    assert np.abs(ours - theirs).max() < 1e-4
    if seconds < 30:  # filled up with silence to a window
        theirs = extract(samples, padding="max_length", **options).input_features[0]
        heard = hear(packed(samples, RATE, "WAV", "FLOAT"), bands, 3000, 60)
        assert heard.frames == -(-len(samples) // 160)
        assert np.abs(heard.mel - theirs).max() < 1e-4


def test_each_band_of_the_mel_scale_is_a_triangle_of_the_same_area() -> None:
    filters = mel_filters(80)
    assert (filters >= 0).all() and filters.shape == (201, 80)
    wide = filters[:, 60:].sum(0) * 40  # 40 Hz from one frequency to the next
    assert np.abs(wide - 1).max() < 0.1


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 44_100, 48_000])
def test_a_tone_stays_itself_at_another_rate(rate: int) -> None:
    def tone(at_rate: int, pitch: float) -> Any:
        return (0.5 * np.sin(2 * np.pi * pitch * np.arange(2 * at_rate) / at_rate)).astype(np.float32)

    found = resampled(tone(rate, 1000), rate)
    assert len(found) == 2 * RATE
    assert np.abs(found - tone(RATE, 1000))[300:-300].max() < 1e-4
    if rate > 20_000:  # what 16 kHz cannot hold does not come back as another tone
        assert np.abs(resampled(tone(rate, 9_500), rate))[300:-300].max() < 1e-3


@pytest.mark.parametrize(
    ("kind", "subtype", "near"),
    [
        *(("WAV", width, 2e-4) for width in ("PCM_16", "PCM_24", "FLOAT")),
        *(("FLAC", None, 2e-4), ("AIFF", None, 2e-4), ("OGG", "VORBIS", 0.1), ("OGG", "OPUS", 0.1), ("MP3", None, 0.1)),
    ],
)
def test_every_format_gives_the_same_sound(kind: str, subtype: str | None, near: float) -> None:
    samples = sound(1.5)
    data = packed(np.stack([samples, samples], 1), RATE, kind, subtype)
    assert kind_of(data) == kind.lower()
    found = decode(data, 60)
    assert abs(len(found) - len(samples)) < 2500  # mp3 fills up its frames
    if near < 0.01:
        assert np.abs(found - samples).max() < near
    else:  # heard as the same, at a place of its own
        assert abs(np.square(found).sum() / np.square(samples).sum() - 1) < near


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_wav_needs_no_package(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = sound(0.5)
    data = packed(samples, 8_000, "WAV", {1: "PCM_U8", 2: "PCM_16", 3: "PCM_24", 4: "PCM_32"}[width])
    want = decode(data, 60)
    monkeypatch.setitem(sys.modules, "soundfile", None)
    assert np.abs(decode(data, 60) - want).max() < 1e-5
    with pytest.raises(BadRequest, match=r"phloem\[audio\]"):
        decode(b"fLaC" + bytes(100), 60)


GOOD = wav(sound(1.0))
BAD = {
    "nothing": b"",
    "text": b"hello, this is no sound at all",
    "an m4a file": b"\0\0\0 ftypM4A " + bytes(100),
    "a header alone": GOOD[:30],
    "a riff of something else": b"RIFF" + bytes(200),
    "flac of zeros": b"fLaC" + bytes(500),
    "ogg of zeros": b"OggS" + bytes(500),
    "mp3 of zeros": b"ID3" + bytes(500),
    "no samples": wav(np.zeros(0, np.float32)),
    "a rate of 1 Hz": wav(sound(1.0), 1),
    "too many channels": wav(sound(0.1), channels=40),
    "too long": wav(np.zeros(16_000 * 6, np.float32)),
    "not numbers": packed(np.full(16_000, np.nan, np.float32), RATE, "WAV", "FLOAT"),
}


@pytest.mark.parametrize("what", BAD)
@pytest.mark.parametrize("plain", [False, True])
def test_what_cannot_be_heard_is_refused_by_its_field(what: str, plain: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if plain:
        monkeypatch.setitem(sys.modules, "soundfile", None)
    with pytest.raises(BadRequest) as told:
        hear(BAD[what], 80, 3000, most_seconds=5, param="file")
    assert told.value.param == "file" and told.value.message.startswith("file: ")


def test_a_length_that_the_header_makes_up_harms_nobody() -> None:
    lying = bytearray(wav(sound(1.0)))
    lying[40:44] = (2**32 - 1).to_bytes(4, "little")
    assert len(decode(bytes(lying), 3600)) <= RATE + 1


def test_a_bomb_is_stopped_while_it_is_decoded() -> None:
    silence = packed(np.zeros(RATE * 600, np.int16), RATE, "FLAC")
    assert len(silence) < 200_000
    with pytest.raises(BadRequest, match="more than 60 s"):
        decode(silence, 60)


def test_wav_without_soundfile_is_refused_as_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks that end before they begin, samples of eleven bytes: whatever a header says."""
    random = np.random.default_rng(1)
    whole = wav(sound(0.02))
    monkeypatch.setitem(sys.modules, "soundfile", None)
    for _ in range(600):
        broken = bytearray(whole)
        for at in random.integers(4, 60, 3):
            broken[at] = random.integers(256)
        try:
            assert np.isfinite(decode(bytes(broken), 10)).all()
        except BadRequest as error:
            assert error.param == "file"


def test_what_a_decoder_says_tells_no_places_in_memory() -> None:
    with pytest.raises(BadRequest) as told:
        decode(b"fLaC" + bytes(50), 10)
    assert "0x" not in told.value.message and "object" not in told.value.message
