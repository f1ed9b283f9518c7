"""What is asked of `/v1/audio/transcriptions` and `/v1/audio/translations`, as the fields of a form."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import msgspec

from phloem.core.errors import BadRequest
from phloem.protocol.audio.languages import LANGUAGES
from phloem.protocol.audio.windows import Doubts
from phloem.protocol.body import Body

Format = Literal["json", "text", "srt", "verbose_json", "vtt"]
Grain = Literal["segment", "word"]
Temperature = Annotated[float, msgspec.Meta(ge=0, le=1)]
FALLBACKS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)  # tried one after the other while a window's transcript looks wrong


class _Audio(Body):
    file: Annotated[bytes, msgspec.Meta(description="The sound file: wav, flac, ogg, mp3 or aiff.")]
    model: str | None = None
    prompt: str | None = None  # text that came before, or names as they are to be spelled
    response_format: Format = "json"
    temperature: Temperature = 0.0
    seed: int | None = None
    # As Whisper's own program and transformers call them.
    compression_ratio_threshold: Annotated[float, msgspec.Meta(ge=0)] = 2.4
    logprob_threshold: Annotated[float, msgspec.Meta(le=0)] = -1.0
    no_speech_threshold: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.6

    @property
    def doubts(self) -> Doubts:
        return Doubts(self.compression_ratio_threshold, self.logprob_threshold, self.no_speech_threshold)

    @property
    def temperatures(self) -> tuple[float, ...]:
        return FALLBACKS if self.temperature == 0 else (self.temperature,)


class TranslationBody(_Audio):
    """English text of speech in any language."""


class TranscriptionBody(_Audio):
    """Text of speech, in its own language."""

    ignored: ClassVar[dict[str, str]] = {"include": "logprobs are those of segments, in verbose_json"}

    language: str | None = None
    timestamp_granularities: list[Grain] | None = None
    stream: bool = False
    chunking_strategy: Literal["auto"] | None = None
    include: list[str] | None = None

    def check(self) -> None:
        """Raises BadRequest for fields that do not go together, and for what is not there."""
        grains = self.timestamp_granularities or []
        if grains and self.response_format != "verbose_json":
            raise BadRequest(
                "timestamp_granularities needs response_format verbose_json", param="timestamp_granularities"
            )
        if self.stream and self.response_format not in ("json", "text"):
            raise BadRequest("a stream has text alone: response_format json or text", param="stream")


def language_code(asked: str, known: dict[str, int]) -> str:
    """The code of a language that is asked for by code or name. Raises BadRequest where the model does not know it."""
    name = asked.strip().lower()
    code = next((code for code, full in LANGUAGES.items() if name == full), name.split("-")[0])
    if code in known or (not known and code == "en"):
        return code
    listed = ", ".join(sorted(known)) or "en"
    raise BadRequest(f"language {asked!r:.50}: this model knows {listed}", param="language")
