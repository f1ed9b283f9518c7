"""Which tokens end an answer, beyond the ids that a checkpoint's configuration names."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

# Tokens that end a turn, or a whole text, in the chat formats of published models.
ENDS = frozenset(
    (
        "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|endoftext|>", "<|end|>", "<|end_of_turn|>",
        "<end_of_turn>", "<turn|>", "<|eot|>", "<|eom|>", "<|END_OF_TURN_TOKEN|>", "<|endofturn|>",
        "<|return|>", "<|call|>", "<end_of_utterance>", "<｜end▁of▁sentence｜>", "<|end▁of▁sentence|>",
    )
)  # fmt: skip
# Where the key is there, the value separates parts of one answer.
_PARTS = {"<|return|>": "<|end|>"}
_ADDED = '"added_tokens"'


def ids_by_text(tokens: Iterable[str]) -> list[int]:
    """Ids of the tokens of a vocabulary, in its order, whose text says that they end a turn or a text."""
    found = {text: number for number, text in enumerate(tokens) if text in ENDS}
    for key, part in _PARTS.items():
        if key in found:
            found.pop(part, None)
    return sorted(found.values())


def tokenizer_end(path: Path) -> list[int]:
    """The id of the `eos_token` that a tokenizer's own files name; [] where they name none, or are not readable.

    Args:
        path: a directory, or the `tokenizer.json` in it.
    """
    folder = path if path.is_dir() else path.parent
    config = _read(folder / "tokenizer_config.json")
    text = _text(config.get("eos_token")) or _text(_read(folder / "special_tokens_map.json").get("eos_token"))
    if text is None:
        return []
    listed = config.get("added_tokens_decoder")
    for number, entry in cast("Mapping[str, Any]", listed if isinstance(listed, dict) else {}).items():
        if _text(entry) == text and number.isdecimal():
            return [int(number)]
    number = _read(folder / "added_tokens.json").get(text)
    if isinstance(number, int):
        return [number]
    added = _added(path if path.is_file() else folder / "tokenizer.json")
    return [entry["id"] for entry in added if entry.get("content") == text and isinstance(entry.get("id"), int)][:1]


def _text(value: Any) -> str | None:
    text = cast("dict[str, Any]", value).get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None


def _read(path: Path) -> dict[str, Any]:
    """A JSON object; what cannot be read says nothing here: the tokenizer's loader reports it."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}


def _added(path: Path) -> list[dict[str, Any]]:
    """The added tokens of a tokenizer.json, without parsing the vocabulary behind them, which is megabytes."""
    try:
        text = path.read_text("utf-8")
        found, _ = json.JSONDecoder().raw_decode(text, text.index("[", text.index(_ADDED)))
    except (OSError, ValueError):
        return []
    return [cast("dict[str, Any]", entry) for entry in cast("list[Any]", found) if isinstance(entry, dict)]
