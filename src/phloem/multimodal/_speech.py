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
    heads: tuple[tuple[int, int], ...] = ()  # (layer, head) whose attention follows what is heard
    width: int = 7  # states over which that is smoothed

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
    width = config[names["width"]]
    if not isinstance(width, int) or width < 1 or width % 2 == 0:
        raise ModelLoadError(f"median_filter_width: expected an odd number, got {width!r:.50}")
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
        heads=_heads(generation.get("alignment_heads"), int(config[names["layers"]]), int(config[names["heads"]])),
        width=width,
    )


def _ids(said: object) -> tuple[int, ...]:
    return tuple(int(token) for token in said if token >= 0) if isinstance(said, list) else ()


def _heads(said: object, layers: int, heads: int) -> tuple[tuple[int, int], ...]:
    """Pairs as `alignment_heads` of generation_config.json; where there are none, all heads of the later half of the
    layers, as in Whisper's own code. Raises ModelLoadError."""
    if said is None or said == []:
        return tuple((layer, head) for layer in range(layers // 2, layers) for head in range(heads))
    found: list[tuple[int, int]] = []
    for pair in said if isinstance(said, list) else [None]:
        match pair:
            case [int(layer), int(head)] if 0 <= layer < layers and 0 <= head < heads:
                found.append((layer, head))
            case _:
                text = f"expected pairs of a layer below {layers} and a head below {heads}, got {pair!r:.50}"
                raise ModelLoadError(f"generation_config.json: alignment_heads: {text}")
    return tuple(found)
