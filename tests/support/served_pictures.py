"""A server of pictures in processes of its own, and its files read back."""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def serving(folder: Path, *options: str) -> Generator[str]:
    """The address of `phloem serve` on a free port; it is ended by SIGTERM."""
    command = [sys.executable, "-m", "phloem", "serve", "--model-path", str(folder), "--port", "0", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as server:
        assert server.stdout is not None
        lines: list[str] = []
        try:
            for line in server.stdout:
                lines.append(line)
                if line.startswith("Serving "):
                    yield line.split()[-1]
                    break
            else:
                raise AssertionError("".join(lines[-20:]))
        finally:
            server.terminate()
            server.wait(20)


def read_png(data: bytes) -> Any:
    """[height, width, 3]."""
    import numpy as np
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
