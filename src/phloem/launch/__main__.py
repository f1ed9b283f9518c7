"""The engine process: imports, reads its order from standard input, serves, ends with its parent."""

from __future__ import annotations

import gc
import linecache
import signal
import sys
from time import perf_counter
from typing import TYPE_CHECKING, Any

import msgspec

from phloem.checkpoint.describe import described
from phloem.core.config import Config, log_format
from phloem.core.errors import PhloemError
from phloem.core.messages import Failed, Progress, decode_to_engine, encode, refusal
from phloem.utils import garbage, log, machine, memory
from phloem.utils.ipc import EnginePipe
from phloem.utils.processes import die_with_parent, killed_with_parent

if TYPE_CHECKING:
    from collections.abc import Callable

    from phloem.core.messages import FromEngine, ToEngine

_log = log.get("launch")


def main() -> int:
    """`python -m phloem.launch PIPE DOOR`: the number of our end of the pipe, and the door's process id.

    What the engine imports is imported first, beside the door's reading of options; then the order is waited for.
    """
    descriptor, door = int(sys.argv[1]), int(sys.argv[2])
    killed_with_parent(door)
    # Both may reach the whole process group at once; what they mean is the door's to decide, and it ends us.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    begun = perf_counter()
    engine = _engine()
    seconds = perf_counter() - begun
    line = sys.stdin.buffer.readline()
    if not line:
        return 1  # whoever started us wanted no engine
    die_with_parent(door)
    order: dict[str, Any] = msgspec.json.decode(line)
    config = Config.from_flat(order["config"])
    log.configure(config.server.log_level, "engine", log_format())
    pipe = EnginePipe(descriptor)
    try:
        if isinstance(engine, Exception):
            raise engine
        pipe.send(encode(Progress(phase="imports", seconds=seconds)))
        _serve(engine, config, pipe)
    except Exception as error:
        reason = machine.exhausted(error)
        if reason is not None:
            pipe.send(encode(Failed(error=reason, kind=type(error).__name__)))
        elif not isinstance(error, PhloemError):
            _log.exception("the engine stops")
        return 1
    finally:
        pipe.close()
    return 0


def _engine() -> Callable[..., None] | Exception:
    """`core.serve`, or why it cannot be imported. Seconds of imports (torch): only once this process ends with its
    parent and leaves signals alone."""
    try:
        with garbage.left_alone():
            from phloem.launch.core import serve
    except Exception as error:
        return error
    return serve


def _serve(engine: Callable[..., None], config: Config, pipe: EnginePipe) -> None:
    def send(message: FromEngine) -> None:
        pipe.send(encode(message))

    def poll(timeout: float | None) -> list[ToEngine]:
        return received(pipe.poll(timeout), send)

    model = config.model
    checkpoint = described(model)
    engine(config, checkpoint, send, poll, _settle, memory.trim)


def received(frames: list[bytes], send: Callable[[FromEngine], None]) -> list[ToEngine]:
    """The door's messages. What is not understood is answered, so that nobody waits for ever."""
    found: list[ToEngine] = []
    for data in frames:
        try:
            found.append(decode_to_engine(data))
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            answer = refusal(data, str(error))
            done = "refused" if answer else "dropped"
            _log.error("a message from the door was not understood and is %s: %s", done, error)
            if answer is not None:
                send(answer)
    return found


def _settle() -> None:
    # A full collection looks through all that torch has made: a tenth of a second between two tokens.
    gc.freeze()
    linecache.clearcache()  # sources that torch looks through while it is imported
    _log.debug("%d MiB of libraries were for the start alone", memory.release_libraries() >> 20)


if __name__ == "__main__":
    sys.exit(main())
