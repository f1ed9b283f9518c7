"""Who has a folder of films: one server at a time, by a lock that ends with its process.

Imported before a model is loaded, so that a folder that is taken is told at once: nothing large is imported here.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import IO

from phloem.core.errors import ConfigError

if sys.platform == "win32":
    import msvcrt

    def _take(file: IO[str]) -> None:
        """Raises OSError: another process has it."""
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
else:
    import fcntl

    def _take(file: IO[str]) -> None:
        """Raises BlockingIOError: another process has it."""
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


class FilmFolder:
    """A folder, made where it is missing, and the lock on it.

    Raises:
        ConfigError: it cannot be written, or another server has it.
    """

    def __init__(self, folder: str) -> None:
        self.path = Path(folder).expanduser()
        name = "video_output_path"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / ".lock").open("w")
        except OSError as error:
            raise ConfigError(f"{self.path}: {error.strerror}", param=name) from None
        try:
            _take(self._lock)
        except OSError as error:
            self._lock.close()
            taken = isinstance(error, BlockingIOError | PermissionError) or os.name == "nt"
            why = "another server keeps its films there" if taken else error.strerror
            raise ConfigError(f"{self.path}: {why}", param=name) from None

    def close(self) -> None:
        """Let another server have it."""
        self._lock.close()
