"""The engine in a process of its own, as the door sees it: `python -m phloem.launch`, its order on standard input."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import subprocess
from collections.abc import Callable
from time import perf_counter
from typing import TYPE_CHECKING

import msgspec

from phloem.core.errors import EngineDead
from phloem.core.messages import Drain, EngineLink, FromEngine, ToEngine, decode_from_engine, encode
from phloem.launch import early
from phloem.utils import machine
from phloem.utils.ipc import DoorPipe
from phloem.utils.processes import Stopped

if TYPE_CHECKING:
    from phloem.core.config import Config

LEAVE_SECONDS = 3.0  # that an engine that was asked to end gets for it
EXIT_SECONDS, EXIT_LOOKS = 1.0, 50  # how long, and how often, an engine that has hung up is asked for its exit status


class EngineProcess(EngineLink):
    """Starts the engine process at once, or takes one that has begun; it imports torch and loads weights while this
    process does its own part."""

    def __init__(self, config: Config) -> None:
        self.started = perf_counter()
        runtime = config.runtime
        # Of several, one that is stopped holds up the others; one alone is waited for (`engine_hang_timeout`).
        several = max(runtime.tp_size, runtime.pp_size, runtime.dp_size) > 1
        self._stopped = Stopped() if several else None
        self._leave = LEAVE_SECONDS if config.nodes.nnodes > 1 else 0.0  # it says goodbye to other machines
        self._leaving = False
        begun = early.take()
        self._process, self._pipe = begun.process, DoorPipe(begun.pipe)
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended: whoever listens to it is told how
            self._process.stdin.write(msgspec.json.encode({"config": config.flat()}) + b"\n")
            self._process.stdin.flush()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        if self._process.poll() is not None:
            return False
        return self._stopped is None or not self._stopped.seen(self._process.pid)

    def send(self, message: ToEngine) -> None:
        if not self.alive:
            raise EngineDead(self._reason())
        self._leaving = self._leaving or isinstance(message, Drain)
        self._pipe.send(encode(message))

    async def deliver(self, take: Callable[[FromEngine], bool]) -> None:
        try:
            await self._pipe.deliver(lambda data: take(decode_from_engine(data)))
        except EOFError:
            # The socket closes a moment before the process has ended and its status can be had.
            for _ in range(EXIT_LOOKS):
                if self._process.poll() is not None:
                    break
                await asyncio.sleep(EXIT_SECONDS / EXIT_LOOKS)
            raise EngineDead(self._reason()) from None

    @property
    def end(self) -> str:
        return self._reason()

    def _reason(self) -> str:
        code = self._process.poll()
        if code is None and not self.alive:
            return f"the engine process ({self.pid}) was stopped by a signal"
        return f"the engine process {_describe_exit(code)}"

    def close(self) -> None:
        """End the process, by force if it has not ended by itself."""
        if self._leaving and self.alive:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(self._leave)
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
        self._pipe.close()


def _describe_exit(code: int | None) -> str:
    if code is None:
        return "does not answer"
    if code < 0:
        # Libraries that get no memory for a thread abort.
        return f"was killed by {signal.Signals(-code).name}{_of_addresses() if -code == signal.SIGABRT else ''}"
    # The system's linker, which finds no room for a library, ends the process so.
    return f"ended with exit status {code}{_of_addresses() if code == 127 else ''}"


def _of_addresses() -> str:
    space = machine.address_space()
    return f": the system allows it {space >> 20} MiB of addresses, raise it with `ulimit -v`" if space else ""
