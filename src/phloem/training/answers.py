"""The model answers prompts itself, through the engine: what it learns to draft for is then what it says."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import phloem
from phloem.core.errors import PhloemError
from phloem.training.data import question
from phloem.training.states import NoSpace

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from phloem.training.data import Asked, Row

TOGETHER = 32  # prompts that are with the engine at once


class Answerer:
    """An engine, started when the first answer is wanted."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self._settings = settings
        self._engine: phloem.Engine | None = None

    def close(self) -> None:
        if self._engine is not None:
            self._engine.shutdown()
            self._engine = None

    def write(
        self,
        path: Path,
        prompts: Sequence[Asked],
        rows: Sequence[Row],
        params: dict[str, Any],
        told: Callable[[int, int], None],
    ) -> None:
        """A line for each prompt: its `input_ids`, the answer's `output_ids` and text, and the question's `messages`
        where it has pictures. A file that has them already stays as it is: a training that goes on must see the same.

        Raises:
            NoSpace: the file cannot be written.
        """
        ids = [one.ids for one in prompts]
        asked = repr((self._settings["model_path"], ids, sorted(params.items())))
        seen = repr([source.data or source.text for one in prompts for source in one.pictures])
        asked += seen if any(one.pictures for one in prompts) else ""
        mark = hashlib.sha256(asked.encode()).hexdigest()[:16]
        if _written(path) == mark:
            return
        if self._engine is None:
            self._engine = phloem.Engine(**self._settings)
        engine, part = self._engine, path.with_name(f".{path.name}.part")
        try:
            with part.open("w") as file:
                for begin in range(0, len(prompts), TOGETHER):
                    some = prompts[begin : begin + TOGETHER]
                    first = params["sampling_seed"] + begin
                    each = [{**params, "sampling_seed": first + at} for at in range(len(some))]
                    more: dict[str, Any] = {}
                    if any(one.pictures for one in some):
                        more["image_data"] = [list(one.pictures) or None for one in some]
                    given = [list(one.ids) for one in some]
                    answers: Any = engine.generate(input_ids=given, sampling_params=each, **more)
                    for row, one, answer in zip(rows[begin:], some, answers, strict=False):
                        line = {"line": row.line, "of": mark, "input_ids": one.ids, "output_ids": answer["output_ids"]}
                        if one.pictures:
                            line["messages"] = question(row)
                        file.write(json.dumps({**line, "answer": answer["text"]}, ensure_ascii=False) + "\n")
                    told(min(begin + TOGETHER, len(prompts)), len(prompts))
            part.replace(path)
        except OSError as error:
            raise NoSpace(f"{path} cannot be written: {error.strerror or error}") from None
        finally:
            part.unlink(missing_ok=True)


def _written(path: Path) -> str | None:
    """Of which prompts and settings a file has the answers."""
    try:
        with path.open() as file:
            return json.loads(file.readline())["of"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def fitting(prompts: Sequence[Asked], rows: Sequence[Row], room: int) -> tuple[list[Asked], list[Row]]:
    """Prompts that leave room for an answer of two tokens at least. Raises PhloemError if there are none."""
    pairs = [(asked, row) for asked, row in zip(prompts, rows, strict=True) if 0 < asked.length <= room - 2]
    if not pairs:
        raise PhloemError(f"every prompt is longer than max_length, {room} tokens, leaves room for")
    return [asked for asked, _ in pairs], [row for _, row in pairs]
