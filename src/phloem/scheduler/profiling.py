"""`start_profile` and `stop_profile`: a trace of the steps between them, or of so many steps."""

from __future__ import annotations

import logging
import os
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from phloem.core.errors import BadRequest
from phloem.utils.profiler import Profiler

if TYPE_CHECKING:
    from collections.abc import Callable

    from phloem.scheduler.metrics import Meter

log = logging.getLogger(__name__)


class Profiled(Protocol):
    """What is traced: the scheduler."""

    meter: Meter

    def settle(self) -> None: ...


class Profiling:
    """At most one trace at a time; it is written beside the steps."""

    def __init__(self, scheduler: Profiled) -> None:
        self._scheduler = scheduler
        self._profiler: Profiler | None = None
        self._path = Path()
        self._first = 0  # the step that it begins with, and the one before which it ends by itself; 0: when it is told
        self._last = 0
        self._asked: dict[str, Any] = {}
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="phloem-profile")
        self._writing: Future[None] | None = None

    def start(self, args: dict[str, Any]) -> str:
        """Begin now, or with step `start_step`, for `num_steps` or until `stop`; gives the file that will be written.

        Raises:
            BadRequest: a trace is being made, or the one before is being written.
        """
        if self._path.name:
            raise BadRequest(f"a profile is being made already: {self._path}", code="profiling")
        if self._writing is not None and not self._writing.done():
            raise BadRequest("the profile before is still being written", code="profiling")
        steps, name = self._scheduler.meter.steps, str(args.get("prefix") or "phloem")
        self._path = _unused(Path(str(args["folder"])), f"{name}-{int(time.time())}-{os.getpid()}")
        self._asked, self._first = args, max(steps, int(args.get("start_step") or 0))
        self._last = self._first + int(args["num_steps"]) if args.get("num_steps") else 0
        path = str(self._path)
        if steps >= self._first:
            self._begin()
        return path

    def stop(self) -> tuple[Future[None], Path]:
        """Raises BadRequest: none is being made."""
        if not self._path.name:
            raise BadRequest("no profile is being made: start_profile begins one", code="not_profiling")
        return self._end()

    def poll(self) -> None:
        """Begin and end at the steps that were asked for."""
        if not self._path.name:
            return
        steps = self._scheduler.meter.steps
        if self._profiler is None and steps >= self._first:
            try:
                self._begin()
            except BadRequest as error:  # whoever asked has had the answer long ago
                log.warning("%s", error.message)
                return
        if self._last and steps >= self._last:
            self._end()

    def _begin(self) -> None:
        asked = self._asked
        try:
            self._profiler = Profiler(
                tuple(asked["activities"]), stacks=bool(asked["with_stack"]), shapes=bool(asked["record_shapes"])
            )
        except RuntimeError as error:
            self._path = Path()
            raise BadRequest(f"no profile can be made: {error}", code="profiling") from None
        log.info("profile: begins with step %d", self._scheduler.meter.steps)

    def _end(self) -> tuple[Future[None], Path]:
        profiler, path = self._profiler, self._path
        self._profiler, self._path = None, Path()
        if profiler is None:
            raise BadRequest(f"the profile was to begin with step {self._first}: it was not made", code="not_profiling")
        self._scheduler.settle()
        profiler.stop()
        self._writing = self._writer.submit(_written, profiler.write, path)
        return self._writing, path

    def close(self) -> None:
        """The engine stops: what was traced is written."""
        if self._profiler is not None:
            self._end()
        self._writer.shutdown()


def _unused(folder: Path, stem: str) -> Path:
    """A file that is not there: several traces may be made within a second."""
    names = (f"{stem}{end}.trace.json.gz" for end in ("", *(f"-{number}" for number in range(2, 1_000_000))))
    return next(folder / name for name in names if not (folder / name).exists())


def _written(write: Callable[[Path], None], path: Path) -> None:
    begun = time.perf_counter()
    try:
        write(path)
    except OSError as error:
        log.warning("profile: %s was not written: %s", path, error)
        raise BadRequest(f"{path} was not written: {error}", code="storage_failed") from None
    log.info("profile: %s, %.1f MB, written in %.1f s", path, path.stat().st_size / 1e6, time.perf_counter() - begun)
