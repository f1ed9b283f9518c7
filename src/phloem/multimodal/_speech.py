"""What a model of speech is told its task with: the tokens around a transcript (Radford et al., 2022)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from phloem.core.errors import ModelLoadError

TICK = 0.02  # seconds from one timestamp token to the next
FRAMES_PER_TICK = 2


@dataclass(frozen=True)
class Speech:
    """A model's tokens and sizes. `languages`: code -> token; empty for a model of English alone."""

    bands: int
    frames: int  # of the window that it hears at a time
    start: int  # <|startoftranscript|>
    end: int  # <|endoftext|>: every text token is below it
    no_timestamps: int
    first_timestamp: int  # <|0.00|>; the others follow
    previous: int | None = None  # <|startofprev|>: before an earlier text
    no_speech: int | None = None
    transcribe: int | None = None
    translate: int | None = None
    languages: dict[str, int] = field(default_factory=dict)
    suppressed: tuple[int, ...] = ()
    suppressed_first: tuple[int, ...] = ()  # as the first token of a transcript
    latest_first: int | None = None  # ticks: a transcript begins no later

    @property
    def multilingual(self) -> bool:
        return bool(self.languages)

    @property
    def seconds(self) -> float:
        """Of the window."""
        return self.frames / 100


def speech_of(
    config: Mapping[str, Any],
    names: Mapping[str, str],
    generation: Mapping[str, Any],
    id_of: Callable[[str], int | None],
) -> Speech:
    """From config.json (whose keys a family names), generation_config.json, and the tokenizer.

    Raises:
        ModelLoadError: a token that the model cannot do without is in neither.
    """

    def needed(token: str, said: object) -> int:
        found = said if isinstance(said, int) else id_of(token)
        if found is None:
            raise ModelLoadError(f"the tokenizer has no {token}, which a model of speech needs")
        return found

    codes = generation.get("lang_to_id")
    languages = {name.strip("<|>"): int(token) for name, token in codes.items()} if isinstance(codes, dict) else {}
    tasks = generation.get("task_to_id")
    tasks = tasks if isinstance(tasks, dict) else {}
    plain = needed("<|notimestamps|>", generation.get("no_timestamps_token_id"))
    initial = generation.get("max_initial_timestamp_index")
    silence = id_of("<|nospeech|>")
    return Speech(
        bands=int(config[names["bands"]]),
        frames=2 * int(config[names["states"]]),
        start=needed("<|startoftranscript|>", generation.get("decoder_start_token_id")),
        end=needed("<|endoftext|>", id_of("<|endoftext|>") or generation.get("eos_token_id")),
        no_timestamps=plain,
        first_timestamp=plain + 1,
        previous=id_of("<|startofprev|>"),
        no_speech=id_of("<|nocaptions|>") if silence is None else silence,
        transcribe=tasks.get("transcribe", id_of("<|transcribe|>")),
        translate=tasks.get("translate", id_of("<|translate|>")),
        languages=languages if generation.get("is_multilingual", bool(languages)) else {},
        suppressed=_ids(generation.get("suppress_tokens")),
        suppressed_first=_ids(generation.get("begin_suppress_tokens")),
        latest_first=initial if isinstance(initial, int) else None,
    )


def _ids(said: object) -> tuple[int, ...]:
    return tuple(int(token) for token in said if token >= 0) if isinstance(said, list) else ()
