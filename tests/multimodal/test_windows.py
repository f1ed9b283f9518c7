"""What a window's tokens say, where a long audio is cut, and how transcripts are written."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from phloem.bench.transcribe import word_error_rate
from phloem.core.errors import BadRequest
from phloem.multimodal._speech import Speech
from phloem.protocol.audio.body import language_code
from phloem.protocol.audio.run import Segment, Transcript
from phloem.protocol.audio.windows import Doubts, Told, best, cuts, part_of, pieces
from phloem.protocol.audio.words import begins, shared, split, timed
from phloem.protocol.audio.write import written

SPEECH = Speech(bands=80, frames=3000, start=101, end=100, no_timestamps=110, first_timestamp=111)


def at(seconds: float) -> int:
    return 111 + round(seconds / 0.02)


def test_closed_segments_and_the_rest_is_heard_again() -> None:
    tokens = [at(0), 5, 6, at(2), at(2), 7, at(3.5), at(4), 8]
    found, more = pieces(tokens, SPEECH, 30.0, 3000)
    assert [(one.start, one.end) for one in found] == [(30.0, 32.0), (32.0, 33.5)]
    assert [one.tokens for one in found] == [tuple(tokens[:4]), tuple(tokens[4:7])]
    assert more == 350  # from the end of what is whole, not of the window


def test_a_closed_last_segment_ends_the_window() -> None:
    found, more = pieces([at(0), 5, at(2), at(2), 7, at(3)], SPEECH, 0.0, 3000)
    assert [(one.start, one.end) for one in found] == [(0, 2), (2, 3)]
    assert more == 3000


@pytest.mark.parametrize(
    ("tokens", "end"), [([at(0), 5, at(12)], 12.0), ([at(0), 5, 6], 30.0), ([5, 6], 30.0), ([], 30.0)]
)
def test_without_borders_the_window_is_one_segment(tokens: list[int], end: float) -> None:
    found, more = pieces(tokens, SPEECH, 0.0, 3000)
    assert [(one.start, one.end) for one in found] == [(0.0, end)] and more == 3000


def test_time_never_stands_still() -> None:
    """Whatever the tokens are, the next window begins later and not behind the sound."""
    rng = np.random.default_rng(5)
    for _ in range(500):
        tokens = [int(t) for t in rng.choice([5, 6, *range(111, 131)], rng.integers(0, 12))]
        frames = int(rng.integers(1, 3001))
        found, more = pieces(tokens, SPEECH, 1.0, frames)
        assert 0 < more <= frames
        assert all(1.0 <= one.start <= one.end <= 1.0 + frames / 100 for one in found)


def test_no_segment_ends_behind_the_sound() -> None:
    """A model that hears a short file filled up with silence may say so."""
    found, _ = pieces([at(0), 5, at(2), at(2), 6, at(3.7)], SPEECH, 30.0, 305)
    assert [(one.start, one.end) for one in found] == [(30.0, 32.0), (32.0, 33.05)]
    found, _ = pieces([at(4), 5], SPEECH, 30.0, 305)
    assert [(one.start, one.end) for one in found] == [(33.05, 33.05)]


def test_long_audio_is_cut_where_it_is_quiet() -> None:
    mel = np.ones((4, 9000), np.float32)
    mel[:, 2850:2862] = -1
    mel[:, 5700:5712] = -1
    found = cuts(mel, 9000, 3000)
    assert found[0][1] in range(2850, 2863) and found[1][1] in range(5700, 5713)
    assert found[0][0] == 0 and found[-1][1] == 9000
    assert all(a[1] == b[0] and a[1] - a[0] <= 3000 for a, b in pairwise(found))
    assert cuts(mel, 3000, 3000) == [(0, 3000)]


def test_a_window_has_nothing_behind_the_end() -> None:
    mel = np.arange(20, dtype=np.float32).reshape(2, 10) + 1
    found = np.frombuffer(part_of(mel, 4, 8, 9), "<f4").reshape(2, 8)
    assert found.tolist() == [[5, 6, 7, 8, 9, 0, 0, 0], [15, 16, 17, 18, 19, 0, 0, 0]]


def test_doubt_is_repetition_or_an_unlikely_text_but_not_silence() -> None:
    def told(text: str, mean: float, silence: float) -> Told:
        return Told((), text, 0.0, mean, silence)

    plain = "The quick brown fox jumps over the lazy dog."
    assert not told(plain, -0.3, 0.1).doubtful
    assert told(plain, -1.5, 0.1).doubtful
    assert told("and so on " * 30, -0.1, 0.1).doubtful
    assert told("", -1.5, 0.9).silent and not told("", -1.5, 0.9).doubtful
    assert not told(plain, -0.3, 0.9).silent
    strict, lax = Doubts(1.0, -0.1, 0.05), Doubts(99.0, -99.0, 1.0)
    assert replace(told(plain, -0.3, 0.1), doubts=strict).silent
    assert replace(told("and so on " * 30, -0.05, 0.1), doubts=strict).doubtful
    assert not replace(told("and so on " * 30, -9.0, 0.9), doubts=lax).doubtful
    tries = [told(plain, -1.2, 0.1), told("and so on " * 30, -0.1, 0.1), told(plain, -3.0, 0.1)]
    assert best(tries) is tries[0] and best(tries[1:2]) is tries[1]


def transcript(*texts: tuple[float, float, str]) -> Transcript:
    segments = [Segment(n, 0, a, b, text, (), 0.0, 0.0, 1.0, 0.0) for n, (a, b, text) in enumerate(texts)]
    return Transcript(4000.0, "en", segments)


def test_subtitles() -> None:
    found = transcript((0.0, 2.5, " Hello."), (3661.042, 3662.0, " a --> b"))
    assert written(found, "text") == "Hello. a --> b\n"
    assert written(found, "srt") == (
        "1\n00:00:00,000 --> 00:00:02,500\nHello.\n\n2\n01:01:01,042 --> 01:01:02,000\na -> b\n\n"
    )
    assert written(found, "vtt").startswith("WEBVTT\n\n00:00:00.000 --> 00:00:02.500\nHello.\n\n01:01:01.042")
    assert written(transcript(), "srt") == "" and written(transcript(), "vtt") == "WEBVTT\n\n"


def test_languages_by_code_or_name() -> None:
    known = {"en": 1, "de": 2, "yue": 3}
    assert [language_code(name, known) for name in ("de", "German", "DE-AT", "cantonese")] == ["de", "de", "de", "yue"]
    with pytest.raises(BadRequest, match="de, en, yue") as told:
        language_code("klingon", known)
    assert told.value.param == "language"
    assert language_code("english", {}) == "en"


def test_word_errors_are_counted() -> None:
    assert word_error_rate("The quick, brown fox.", "the quick brown fox") == 0
    assert word_error_rate("one two three four", "one three four five") == 0.5
    assert word_error_rate("one two", "") == 1.0


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (5, 1), (3, 40), (30, 9)])
def test_the_cheapest_path_is_that_of_transformers(shape: tuple[int, int]) -> None:
    from transformers.models.whisper.generation_whisper import (
        _dynamic_time_warping,  # pyright: ignore[reportPrivateUsage]
    )

    for seed in range(3):
        drawn = np.random.default_rng(seed).integers(-3, 4, shape) / 2.0  # many ties
        rows, states = _dynamic_time_warping(drawn)
        assert begins(drawn).tolist() == states[np.diff(rows, prepend=-1) > 0].tolist()


def test_words_have_their_punctuation_and_no_pauses() -> None:
    texts = [" A", " lit", "tle", " (", "dog", ")", ".", " It", " says", ":", " \u00e9", "t\u00e9", "."]
    parts = split(range(len(texts)), lambda ids: "".join(texts[at] for at in ids), "en")
    assert [text for text, _ in parts] == [" A", " little", " (dog", ")", ".", " It", " says", ":", " été", "."]
    begun = [0, 60, 75, 90, 95, 110, 115, 200, 210, 225, 230, 240, 250, 260]
    words = timed(parts, begun, 10.0, 14.9)
    assert [word.text.strip() for word in words] == ["A", "little", "(dog).", "It", "says:", "été."]
    # The silence before the first word and the pause behind a sentence are nobody's.
    assert 10.5 < words[0].start < words[0].end == 11.2
    assert words[2].end < 13.0 and words[3].start == 14.0 and words[-1].end == 14.9
    assert [len(some) for some in shared(words, [7, 2, 4])] == [3, 2, 1]
    assert split([0, 1], lambda ids: "\ufffd" if list(ids) == [0] else "\u4eca", "ja") == [("\u4eca", 2)]
    assert timed([], [0], 0.0, 1.0) == [] and shared([], [3]) == [()]
