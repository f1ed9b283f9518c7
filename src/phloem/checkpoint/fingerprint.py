"""By what the weights of a checkpoint are known from those of another: names, sizes, and samples of what is in them.

Sizes and times do not tell fine-tuned siblings apart: their shapes are the same, and images and archives often give all
files one time. Small checkpoints are read whole; of large ones a sample lies every few megabytes, in each large matrix.
"""

from __future__ import annotations

import os
from hashlib import blake2b
from typing import TYPE_CHECKING

from phloem.checkpoint.gguf_parts import parts_of

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from phloem.checkpoint.describe import Checkpoint

SAMPLES = 4096  # of all files together
SAMPLE = 4096  # bytes
DIGEST = 16


def weight_files(checkpoint: Checkpoint) -> tuple[Path, ...]:
    """The files that weights are read from; none: they are random."""
    if checkpoint.files or not checkpoint.path.is_file():
        return checkpoint.files
    count = 1 if checkpoint.gguf is None else checkpoint.gguf.metadata.get("split.count", 1)
    parts = tuple(path for path in parts_of(checkpoint.path, count) if path.is_file())
    return parts or (checkpoint.path,)


def fingerprint(checkpoint: Checkpoint) -> str:
    """The same for copies of a checkpoint anywhere. Raises OSError."""
    return of_files(weight_files(checkpoint))


def of_files(paths: Iterable[Path]) -> str:
    """Raises OSError."""
    files = sorted(paths, key=lambda path: path.name)
    sizes = [path.stat().st_size for path in files]
    stride = max(SAMPLE, sum(sizes) // SAMPLES)
    found = blake2b(digest_size=DIGEST)
    for path, size in zip(files, sizes, strict=True):
        found.update(f"{path.name}\0{size}\0".encode())
        fd = os.open(path, os.O_RDONLY)
        try:
            for start in range(0, size, stride):
                found.update(os.pread(fd, SAMPLE, start))
            found.update(os.pread(fd, SAMPLE, max(0, size - SAMPLE)))
        finally:
            os.close(fd)
    return found.hexdigest()
