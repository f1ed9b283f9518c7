"""Runs work under torch's profiler and reads the trace back."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phloem.utils.profiler import Profiler

if TYPE_CHECKING:
    from collections.abc import Callable


def traced(work: Callable[[], object], path: Path | None = None) -> dict[str, Any]:
    """Run `work` with every activity that this torch can see (device kernels where there are any) and give the trace.

    Args:
        work: must have ended on the device too when it returns.
        path: where the trace is kept, for Perfetto or chrome://tracing; None: nowhere.
    """
    profiler = Profiler()
    try:
        work()
    finally:
        profiler.stop()
    with tempfile.TemporaryDirectory() as folder:
        target = path if path is not None else Path(folder) / "trace.json"
        profiler.write(target)
        if target.suffix == ".gz":
            import gzip

            with gzip.open(target, "rt") as file:
                return json.load(file)
        return json.loads(target.read_text())
