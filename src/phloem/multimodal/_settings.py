"""What a checkpoint's folder says of its processors, and how much media a request may have."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, cast

from phloem.core.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

# Of a request, where nobody says otherwise. `page`: pages of all its documents, which count as pictures too.
MOST = {"image": 16, "video": 4, "audio": 8, "page": 16}
FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")


def limits_of(given: str | None) -> dict[str, int]:
    """The most of each kind, of `limit_mm_data_per_request`. Raises ConfigError."""
    if not given:
        return MOST
    try:
        found: Any = json.loads(given)
        limits = {**MOST, **found}
        if "image" in found and "page" not in found:
            limits["page"] = found["image"]
    except (ValueError, TypeError):
        limits = {"": -1}
    if not all(isinstance(limit, int) and not isinstance(limit, bool) and limit >= 0 for limit in limits.values()):
        raise ConfigError(
            f'limit_mm_data_per_request: {given!r:.100} is not like {{"image": 4}}', param="limit_mm_data_per_request"
        )
    if set(limits) != set(MOST):
        raise ConfigError(
            f"limit_mm_data_per_request: {given!r:.100}; known: {', '.join(MOST)}", param="limit_mm_data_per_request"
        )
    return limits


def settings_in(folder: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Those of pictures or sounds, of the whole processor, and of videos; empty where there are none."""
    found: list[dict[str, Any]] = []
    for name in FILES:
        path = folder / name
        try:
            value = json.loads(path.read_text("utf-8")) if path.exists() else {}
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path}: not readable as JSON: {error}") from None
        found.append(value if isinstance(value, dict) else {})
    first, whole, video = found
    # Newer files keep all processors in one.
    return first or _inner(whole, "image_processor"), whole, video or _inner(whole, "video_processor")


def _inner(whole: dict[str, Any], name: str) -> dict[str, Any]:
    value = whole.get(name)
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}
