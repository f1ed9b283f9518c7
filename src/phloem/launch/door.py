"""The door of an engine in this process: its event loop in a thread of its own, and the one way in which all ends.

A door ends by `end`, when Python does, or when the engine that it belongs to is collected. A step that ran on while
Python tears its threads down would abort the process. So would an engine that another thread begins just then: the end
of Python waits until its door stands (`beginning`), and none begins after.
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import contextlib
import os
import threading
from collections.abc import Coroutine, Generator
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from phloem.core.errors import EngineDead, QueueFull
from phloem.core.messages import Drain

if TYPE_CHECKING:
    from concurrent.futures import Future

    from phloem.core.messages import EngineLink

T = TypeVar("T")
_ENDINGS = (asyncio.CancelledError, concurrent.futures.CancelledError, EngineDead, QueueFull)


class Client(Protocol):
    """What is behind the door (`client.EngineClient`); used in the door's loop."""

    draining: bool

    async def close(self) -> None: ...


class EngineDoor:
    """For callers that have no event loop, or another one. Takes work from any thread, until it is ended."""

    def __init__(self, client: Client, link: EngineLink) -> None:
        self.loop = asyncio.new_event_loop()
        self._client, self._link = client, link
        self._pid = os.getpid()
        self._closed = ""  # why it takes no more work
        self._lock = threading.Lock()  # work is given before the end or refused, never lost
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self.loop.run_forever, name="phloem-door", daemon=True)
        self._thread.start()
        _OPEN.add(self)

    @property
    def foreign(self) -> bool:
        """Whether this is a forked child, which has none of the engine's threads."""
        return os.getpid() != self._pid

    def check(self) -> None:
        """Raises EngineDead in a forked child, and after the end."""
        if self.foreign:
            raise EngineDead(
                f"this engine belongs to process {self._pid}: a forked child has none of its threads; "
                "make an engine of its own, or start processes by spawn"
            )
        if self._closed:
            raise EngineDead(self._closed)

    def start(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Raises EngineDead, as `check`."""
        try:
            self.check()
            with self._lock:
                self.check()
                return asyncio.run_coroutine_threadsafe(work, self.loop)
        except EngineDead:
            work.close()
            raise

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Wait for what the work gives. Raises what it raises, and EngineDead, as `check`."""
        future = self.start(work)
        try:
            return future.result()
        except BaseException as error:
            future.cancel()
            told = self.told(error)
            if told is error:
                raise
            raise told from None

    def told(self, error: BaseException) -> BaseException:
        """The error that a caller is given: that of the end, for what the end has cut."""
        return EngineDead(self._closed) if self._closed and isinstance(error, _ENDINGS) else error

    def cancel(self, future: Future[Any]) -> None:
        """Harmless when the loop has ended, and in a forked child, where a lock may be held by nobody."""
        if not self.foreign:
            with contextlib.suppress(RuntimeError):
                future.cancel()

    def end(self, why: str) -> None:
        """End the engine and what waits for it; what runs is cut. Harmless when repeated, and in a forked child."""
        if self.foreign:
            return
        with self._lock:
            first, self._closed = not self._closed, self._closed or why
        if not first:
            self._ended.wait()
            return
        try:
            self._client.draining = True  # what its link says from now on is no failure
            if self._link.alive:
                with contextlib.suppress(EngineDead):
                    self._link.send(Drain(timeout=0.0))
            asyncio.run_coroutine_threadsafe(self._end_all(), self.loop).result()
            self.loop.call_soon_threadsafe(self.loop.stop)
            self._thread.join()
            self.loop.close()
        finally:
            _OPEN.discard(self)
            self._ended.set()

    def end_soon(self) -> None:
        """Wait for nothing: whoever collects an engine may be any thread, the door's own too."""
        if not (self._closed or self.foreign):
            with contextlib.suppress(RuntimeError):  # Python ends and starts no thread: `_end_all` comes
                threading.Thread(target=self.end, args=("the engine was collected",), daemon=True).start()

    async def _end_all(self) -> None:
        await self._client.close()
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.loop.shutdown_asyncgens()


class Begins:
    """Engines on the way to their doors, in any thread; and whether Python ends, so that none may begin."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._open: set[object] = set()  # one for each
        self._ending = False

    @contextlib.contextmanager
    def one(self) -> Generator[None]:
        with self._changed:
            if self._ending:
                raise EngineDead("Python is ending: no engine begins now")
            mine = object()
            self._open.add(mine)
        try:
            yield
        finally:
            with self._changed:
                self._open.discard(mine)
                self._changed.notify_all()

    def end(self, timeout: float) -> bool:
        """None may begin from now on; whether all doors stand within so many seconds."""
        with self._changed:
            self._ending = True
            return self._changed.wait_for(lambda: not self._open, timeout)

    def forked(self) -> None:
        """The threads that began an engine are not here."""
        self._changed, self._open = threading.Condition(), set()


_OPEN: set[EngineDoor] = set()
_BEGINS = Begins()
beginning = _BEGINS.one  # `with beginning():` around all that leads to an engine's door; EngineDead when Python ends
os.register_at_fork(after_in_child=_BEGINS.forked)


@atexit.register
def _end_all() -> None:
    _BEGINS.end(timeout=60.0)
    for door in list(_OPEN):
        door.end("Python is ending")
