"""The memory of weights given to the system and taken again: addresses stay, so recorded steps stay right.

What was there comes back from a copy on disk, where one was made, or from the checkpoint, where the weights are still
those. Otherwise they are lost until new ones come.
"""

from __future__ import annotations

import tempfile
from typing import IO, TYPE_CHECKING

import torch

from phloem.core.config import cache_home
from phloem.utils import memory

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from torch import Tensor

    from phloem.checkpoint.describe import Checkpoint
    from phloem.models._index import WeightIndex


def pieces(index: WeightIndex) -> Iterator[Tensor]:
    """The memory of all weights as rows of bytes, each once."""
    seen: set[int] = set()
    for weight in index.weights:
        value, ops = weight.value, index.table(weight)
        if isinstance(value, torch.Tensor):
            found = [value.view(-1).view(torch.uint8)] if value.is_contiguous() else []
        else:
            found = [] if ops.memory is None else ops.memory(value)
        for piece in found:
            if piece.data_ptr() not in seen:
                seen.add(piece.data_ptr())
                yield piece


def save(index: WeightIndex) -> IO[bytes]:
    """A copy in a file that has no name and goes with this process. Raises OSError."""
    home = cache_home() / "sleep"
    home.mkdir(parents=True, exist_ok=True)
    file = tempfile.TemporaryFile(dir=home)  # noqa: SIM115 - it is kept
    for piece in pieces(index):
        file.write(piece.numpy().data)
    file.flush()
    return file


def restore(index: WeightIndex, file: IO[bytes]) -> None:
    """Raises OSError."""
    file.seek(0)
    for piece in pieces(index):
        view, done = piece.numpy().data, 0
        while done < len(view):
            count = file.readinto(view[done:])  # pyright: ignore[reportUnknownVariableType, reportUnknownMemberType, reportAttributeAccessIssue]
            if not count:
                raise OSError("the copy of the weights is shorter than they are")
            done += int(count)  # pyright: ignore[reportUnknownArgumentType]
    file.close()


def discard(index: WeightIndex) -> int:
    return memory.discard((piece.data_ptr(), piece.numel()) for piece in pieces(index))


def state_of(checkpoint: Checkpoint) -> tuple[tuple[Path, int, int], ...]:
    """By which it shows whether files have changed."""
    files = checkpoint.files or ((checkpoint.path,) if checkpoint.path.is_file() else ())
    stats = [(path, path.stat()) for path in files]
    return tuple((path, stat.st_size, stat.st_mtime_ns) for path, stat in stats)
