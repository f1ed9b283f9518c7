"""A trace of what this process does, by torch's profiler, for Perfetto or chrome://tracing.

Operators of every thread are in it; native kernels are not torch's, so whoever runs a step names it by `span`.
"""

from __future__ import annotations

import os
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager
    from pathlib import Path

ACTIVITIES = ("CPU", "GPU", "MEM")
_running: list[Profiler] = []  # at most one: torch has one profiler a process


def span(name: Callable[[], str]) -> AbstractContextManager[Any]:
    """In a trace, if one is being made, what runs within has this name."""
    if not _running:
        return nullcontext()
    from torch.profiler import record_function

    return record_function(name())


class Profiler:
    """Begins at once. `stop` ends it, `write` takes seconds: any thread may call it.

    Args:
        activities: of `ACTIVITIES`; GPU, where there is none, changes nothing.

    Raises:
        RuntimeError: another one runs in this process.
    """

    def __init__(self, activities: tuple[str, ...] = ("CPU", "GPU"), *, stacks: bool = False, shapes: bool = False):
        from torch import profiler

        if _running:
            raise RuntimeError("a profile is being made already")
        devices = profiler.supported_activities() - {profiler.ProfilerActivity.CPU}
        chosen = {profiler.ProfilerActivity.CPU} if "CPU" in activities else set[Any]()
        chosen |= devices if "GPU" in activities else set()
        everywhere: Any = getattr(profiler, "_ExperimentalConfig")(profile_all_threads=True)  # noqa: B009 - not exported
        self._profile = profiler.profile(
            activities=chosen or {profiler.ProfilerActivity.CPU},
            experimental_config=everywhere,
            with_stack=stacks,
            record_shapes=shapes,
            profile_memory="MEM" in activities,
        )
        self._profile.start()
        _running.append(self)

    def stop(self) -> None:
        if self in _running:
            _running.remove(self)
            self._profile.stop()

    def write(self, path: Path) -> None:
        """`path` ends in `.json` or `.json.gz`; it is whole or not there. Raises OSError."""
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{os.getpid()}-{path.name}")
        try:
            self._profile.export_chrome_trace(str(draft))
            if not draft.exists():  # torch reports a failed write in its log alone
                raise OSError(f"{path.parent} cannot be written")
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)
