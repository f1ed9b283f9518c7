"""Answers of `/v1/audio/*`, and subtitles."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from msgspec import UNSET, UnsetType

from phloem.protocol.answers import Answer
from phloem.protocol.audio.languages import LANGUAGES

if TYPE_CHECKING:
    from collections.abc import Iterable

    from phloem.protocol.audio.run import Asked, Segment, Transcript
    from phloem.protocol.audio.words import Word


class DurationUsage(Answer, kw_only=True):
    type: Literal["duration"] = "duration"
    seconds: float


class TranscriptionAnswer(Answer, kw_only=True):
    """Answer of `/v1/audio/transcriptions` and `/translations` with `response_format` json."""

    text: str
    usage: DurationUsage


class TranscriptionSegment(Answer, kw_only=True):
    id: int
    seek: int
    start: float
    end: float
    text: str
    tokens: list[int]
    temperature: float
    avg_logprob: float
    compression_ratio: float
    no_speech_prob: float


class TranscriptionWord(Answer, kw_only=True):
    word: str
    start: float
    end: float


class VerboseAnswer(Answer, kw_only=True):
    """With `response_format` verbose_json: `words`, `segments` or both, as `timestamp_granularities` asks."""

    task: str
    language: str
    duration: float
    text: str
    words: list[TranscriptionWord] | UnsetType = UNSET
    segments: list[TranscriptionSegment] | UnsetType = UNSET
    usage: DurationUsage


class TextDelta(Answer, kw_only=True):
    """Event of a stream: more text."""

    type: Literal["transcript.text.delta"] = "transcript.text.delta"
    delta: str


class TextDone(Answer, kw_only=True):
    """Last event of a stream: all of the text."""

    type: Literal["transcript.text.done"] = "transcript.text.done"
    text: str
    usage: DurationUsage


def usage(found: Transcript) -> DurationUsage:
    return DurationUsage(seconds=round(found.seconds, 2))


def verbose(found: Transcript, asked: Asked) -> VerboseAnswer:
    language = "en" if asked.task == "translate" else found.language
    return VerboseAnswer(
        task=asked.task,
        language=LANGUAGES.get(language, language),
        duration=round(found.seconds, 2),
        text=found.text,
        words=[word(one) for part in found.segments for one in part.words] if asked.words else UNSET,
        segments=[segment(one) for one in found.segments] if asked.segments else UNSET,
        usage=usage(found),
    )


def word(one: Word) -> TranscriptionWord:
    return TranscriptionWord(word=one.text.strip(), start=round(one.start, 2), end=round(one.end, 2))


def segment(one: Segment) -> TranscriptionSegment:
    return TranscriptionSegment(
        id=one.id,
        seek=one.seek,
        start=one.start,
        end=one.end,
        text=one.text,
        tokens=list(one.tokens),
        temperature=one.temperature,
        avg_logprob=one.avg_logprob,
        compression_ratio=one.compression_ratio,
        no_speech_prob=one.no_speech_prob,
    )


def written(found: Transcript, kind: str) -> str:
    """As text, srt or vtt."""
    if kind == "text":
        return found.text + "\n"
    return cues([(one.start, one.end, one.text) for one in found.segments], kind)


def cues(segments: Iterable[tuple[float, float, str]], kind: str) -> str:
    """Subtitles, srt or vtt, of texts with start and end in seconds."""
    lines = [] if kind == "srt" else ["WEBVTT", ""]
    for number, (start, end, text) in enumerate(segments, 1):
        lines += [str(number)] if kind == "srt" else []
        # An arrow in the text would begin a new cue.
        lines += [f"{_clock(start, kind)} --> {_clock(end, kind)}", text.strip().replace("-->", "->"), ""]
    return "\n".join([*lines, ""]) if lines else ""


def _clock(seconds: float, kind: str) -> str:
    total = round(seconds * 1000)
    hours, rest = divmod(total, 3_600_000)
    minutes, rest = divmod(rest, 60_000)
    point = "," if kind == "srt" else "."
    return f"{hours:02}:{minutes:02}:{rest // 1000:02}{point}{rest % 1000:03}"
