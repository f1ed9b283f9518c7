"""Whether two machines have the same checkpoint, told by a few kilobytes: no tensor is compared whole."""

from __future__ import annotations

import hashlib
import json
import os
from typing import TYPE_CHECKING, Any

from phloem.checkpoint.gguf_parts import parts_of
from phloem.core.errors import ModelLoadError

if TYPE_CHECKING:
    from pathlib import Path

    from phloem.checkpoint.describe import Checkpoint

BLOCK = 4096  # bytes of a sample
SAMPLES = 64  # of each file, evenly over it, the first bytes and the last ones among them
LONGEST = 60  # characters of a value that is shown


def weight_files(checkpoint: Checkpoint) -> list[Path]:
    """The files with its tensors, in their order."""
    if checkpoint.gguf is None:
        return sorted(checkpoint.files)
    count = checkpoint.gguf.metadata.get("split.count", 0)
    return (parts_of(checkpoint.gguf.path, count) if isinstance(count, int) else []) or [checkpoint.gguf.path]


def weights_digest(checkpoint: Checkpoint) -> str:
    """Of the sizes of its files and of samples of each: other weights differ in nearly every one. One tensor that was
    changed in few places may not be seen.

    Raises:
        ModelLoadError: a file cannot be read.
    """
    found = hashlib.sha256()
    for path in weight_files(checkpoint):
        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                found.update(size.to_bytes(8, "little"))
                for place in sorted({max(0, size - BLOCK) * at // (SAMPLES - 1) for at in range(SAMPLES)}):
                    found.update(os.pread(file.fileno(), BLOCK, place))
        except OSError as error:
            raise ModelLoadError(f"{path}: {error.strerror}") from None
    return found.hexdigest()[:16]


def config_facts(checkpoint: Checkpoint) -> dict[str, str]:
    """What its configuration says, by key; of long values the beginning and a digest."""
    return {f"config.json {key}": _short(value) for key, value in sorted(checkpoint.config.items())}


def _short(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    if len(text) <= LONGEST:
        return text
    return f"{text[: LONGEST // 2]}... ({hashlib.sha256(text.encode()).hexdigest()[:12]})"
