"""Folders that draw: a `model_index.json` names a pipeline of diffusers and the parts beside it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from phloem.core.errors import ModelLoadError

if TYPE_CHECKING:
    from pathlib import Path

INDEX = "model_index.json"
LIBRARIES = ("diffusers", "transformers")


@dataclass(frozen=True)
class Pictures:
    """A pipeline's folder: its class, and the class of each of its parts."""

    path: Path
    class_name: str
    parts: dict[str, str]


def pictures_of(path: Path) -> Pictures | None:
    """What a folder draws with; None where it has no `model_index.json`.

    Raises:
        ModelLoadError: it is no such index, a part is missing, or one is code that comes with the folder.
    """
    index = path / INDEX
    if not path.is_dir() or not index.exists():
        return None
    try:
        found = json.loads(index.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ModelLoadError(f"{index}: not readable as JSON: {error}") from None
    name = found.get("_class_name") if isinstance(found, dict) else None
    if not isinstance(name, str) or not name.isidentifier():
        raise ModelLoadError(f"{index}: no _class_name, which names the pipeline")
    return Pictures(path, name, _parts(found, index))


def _parts(found: dict[str, Any], index: Path) -> dict[str, str]:
    parts: dict[str, str] = {}
    for name, value in found.items():
        if not isinstance(value, list) or len(value) != 2 or value == [None, None]:
            continue
        library, kind = value
        if library not in LIBRARIES:
            raise ModelLoadError(
                f"{index}: {name} is of {library!r}: code that comes with a checkpoint is never run, only classes of "
                f"{' and '.join(LIBRARIES)} are"
            )
        if not (index.parent / name).is_dir():
            raise ModelLoadError(f"{index}: the folder of {name} is missing: {index.parent / name}")
        parts[name] = str(kind)
    return parts
