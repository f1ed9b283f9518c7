"""Assembles the whole: an engine (scheduler and runner in one thread) in a process of its own or in this one.

`EngineProcess` and `EngineThread` are the two links a door may hold; both run `EngineCore`, so both serve alike.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import linecache
import os
import queue
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from time import monotonic, perf_counter
from typing import TYPE_CHECKING, Any

import msgspec

from phloem.core.config import Config, child_environment
from phloem.core.errors import BadRequest, EngineDead
from phloem.core.messages import (
    EngineLink,
    Failed,
    FromEngine,
    Heartbeat,
    Progress,
    Ready,
    Stats,
    Submit,
    ToEngine,
    decode_from_engine,
    decode_to_engine,
    encode,
)
from phloem.utils import log
from phloem.utils.ipc import DoorPipe, EnginePipe
from phloem.utils.processes import die_with_parent

if TYPE_CHECKING:
    from phloem.checkpoint.describe import Checkpoint
    from phloem.grammar._manager import GrammarManager
    from phloem.grammar._thinking import ThinkingMarkers

_log = log.get("launch")

Send = Callable[[FromEngine], None]

# For glibc's allocator in the engine process: a step's buffers are taken again by the next step instead of being given
# back to the system, whose fresh pages cost as much as a tenth of a prefill; and they may lie on huge pages.
MALLOC = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(32 * 2**20),
    "MALLOC_TRIM_THRESHOLD_": str(256 * 2**20),
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}

EXIT_SECONDS, EXIT_LOOKS = 1.0, 50  # how long, and how often, an engine that has hung up is asked for its exit status
# Seconds without a step after which what the allocator has kept is given back all the same.
REST = 3.0

# Of the KV pool, made resident while nothing else is to do after the start: the first answers do not wait for it.
WARM_BYTES = 256 << 20


class EngineCore:
    """The scheduler on its runner. Built and run by one thread; `send` is called from that thread alone."""

    def __init__(self, config: Config, checkpoint: Checkpoint, send: Send) -> None:
        from phloem.engine import worker
        from phloem.engine.watchdog import Watchdog
        from phloem.kvcache.manager import CacheManager
        from phloem.scheduler.scheduler import Scheduler, ScheduleSettings

        phases: dict[str, float] = {}

        def report(phase: str, seconds: float) -> None:
            phases[phase] = seconds
            send(Progress(phase=phase, seconds=seconds))

        self._closing = threading.Event()
        built = worker.build(config, checkpoint, report)
        schedule = config.schedule
        self.runner = built.runner
        self._watchdog = Watchdog(built.runner, schedule.watchdog_timeout)
        cache = CacheManager(
            built.runner.groups,
            built.runner.num_pages,
            built.runner.page_size,
            enabled=not config.cache.disable_radix_cache,
            eviction=config.cache.radix_eviction_policy,
        )
        settings = ScheduleSettings(
            max_running_requests=built.max_running_requests,
            max_queued_requests=schedule.max_queued_requests,
            chunked_prefill_size=built.chunked_prefill_size,
            mixed_prefill_size=built.mixed_prefill_size,
            worthwhile_prefill=built.worthwhile_prefill,
            schedule_policy=schedule.schedule_policy,
            context_length=built.context_length,
            vocab_size=checkpoint.vocab_size,
            eos_ids=checkpoint.eos_ids,
            stream_interval=schedule.stream_interval,
            random_seed=config.model.random_seed,
            overlap=not schedule.disable_overlap_schedule,
            debug_invariants=config.runtime.debug_invariants,
        )
        self._grammars = _grammars(config, checkpoint)
        prepare = self._grammars.prepare if self._grammars is not None else _no_grammar
        self._sends = send
        self.scheduler = Scheduler(built.runner, settings, cache, self._send, prepare=prepare)
        self.info: dict[str, Any] = {
            **built.info,
            "max_total_num_tokens": built.max_total_tokens,
            "max_running_requests": built.max_running_requests,
            "chunked_prefill_size": built.chunked_prefill_size,
            "page_size": built.runner.page_size,
            "vocab_size": checkpoint.vocab_size,
            "context_length": built.context_length,
            "decisions": [[d.name, d.value, d.reason] for d in built.decisions]
            + ([] if self._grammars is None else [list(self._grammars.decision())]),
            "phases": phases,
        }

    def _send(self, message: FromEngine) -> None:
        if isinstance(message, Stats) and self._grammars is not None:
            message.grammar_seconds = self._grammars.take_compile_seconds()
        self._sends(message)

    def run(self, poll: Callable[[float | None], list[ToEngine]], rest: Callable[[], None] | None = None) -> None:
        """Serve until told to drain. `rest` is called once whenever there was nothing to do for some seconds."""
        from phloem.scheduler import loop

        threading.Thread(target=self._warm, name="phloem-warm", daemon=True).start()
        loop.run(self.scheduler, _Inbox(poll), Resting(rest) if rest is not None else None)

    def _warm(self) -> None:
        from phloem.utils import memory

        memory.background_thread()
        begun = perf_counter()
        done = self.runner.pool.make_resident(WARM_BYTES, self._closing.is_set)
        if done:
            _log.debug("%d MiB of the KV pool made resident in %.2f s", done >> 20, perf_counter() - begun)

    def close(self) -> None:
        self._closing.set()
        self._watchdog.close()
        self.runner.close()
        if self._grammars is not None:
            self._grammars.close()


class Resting:
    """Told of every heartbeat: calls `rest` once when no step has run for REST seconds, and again only after work."""

    def __init__(self, rest: Callable[[], None], clock: Callable[[], float] = monotonic) -> None:
        self._rest, self._clock = rest, clock
        self._step, self._since = -1, clock()
        self._rested = False

    def __call__(self, beat: Heartbeat) -> None:
        if beat.step != self._step:
            self._step, self._since, self._rested = beat.step, self._clock(), False
        elif not self._rested and beat.busy_seconds == 0 and self._clock() - self._since >= REST:
            self._rested = True
            self._rest()


def _grammars(config: Config, checkpoint: Checkpoint) -> GrammarManager | None:
    """What follows constrained requests; it reads the tokenizer when the first one comes. None without a tokenizer."""
    from phloem.grammar._base import Vocabulary
    from phloem.grammar._manager import GrammarManager, GrammarSettings

    def vocabulary() -> Vocabulary:
        from phloem.text.tokenizer import load_tokenizer

        return Vocabulary.of(load_tokenizer(checkpoint), checkpoint.vocab_size, checkpoint.eos_ids)

    if config.model.skip_tokenizer_init:
        return None
    grammar = config.grammar
    settings = GrammarSettings(
        backend=grammar.grammar_backend,
        whitespace=grammar.grammar_whitespace,
        jump_forward=not grammar.disable_jump_forward,
        compile_timeout=grammar.grammar_timeout,
        thinking=_thinking(config, checkpoint),
    )
    return GrammarManager(vocabulary, settings)


def _thinking(config: Config, checkpoint: Checkpoint) -> ThinkingMarkers | None:
    """What stands around a reasoning block; None for a model that writes none."""
    from phloem.grammar._thinking import Channel, ThinkingMarkers
    from phloem.text.formats import THINKING, thinking_choice
    from phloem.text.template_sources import find_sources

    override, asked = (
        Path(config.model.chat_template) if config.model.chat_template else None,
        config.model.reasoning_parser,
    )
    if override is None and all(
        thinking_choice(source, asked).name is None for source in [None, *find_sources(checkpoint).values()]
    ):
        return None  # most models: this process then needs neither a tokenizer nor Jinja
    from phloem.text.template import load_template
    from phloem.text.tokenizer import load_tokenizer

    source = load_template(checkpoint, override, None).source
    name = thinking_choice(source, asked).name
    if name is None:
        return None
    kind = THINKING.module(name).Parser
    tokenizer = load_tokenizer(checkpoint)

    def ids(text: str) -> tuple[int, ...]:
        return tuple(tokenizer.encode(text, add_special_tokens=False))

    start, end = ids(kind.start), ids(kind.end)
    channel = None
    if kind.channel is not None:
        opens, closes = ids(kind.channel[0]), ids(kind.channel[2])
        if len(opens) == len(closes) == 1:
            between = frozenset(found[0] for text in kind.between if len(found := ids(text)) == 1)
            channel = Channel(opens[0], kind.channel[1], closes[0], between)
    whole = len(end) == 1 or any(tokenizer.is_special(token) for token in end)
    jumps = tuple(ids(text) for text in kind.jumps)
    return ThinkingMarkers(start, end, kind.always, "" if whole else kind.end, jumps, channel)


def _no_grammar(submit: Submit, prompt: Any) -> None:
    from phloem.grammar._base import field_of

    field = field_of(submit.sampling)
    if field is not None:
        raise BadRequest(f"{field} needs the tokenizer, which skip_tokenizer_init leaves out", param=field)


class _Inbox:
    def __init__(self, poll: Callable[[float | None], list[ToEngine]]) -> None:
        self._poll = poll

    def poll(self, timeout: float | None) -> list[ToEngine]:
        return self._poll(timeout)


def _serve_core(
    config: Config,
    checkpoint: Checkpoint,
    send: Send,
    poll: Callable[[float | None], list[ToEngine]],
    built: Callable[[], None] | None = None,
    rest: Callable[[], None] | None = None,
) -> None:
    """Build, run and close an engine; whatever ends it is told to the door."""
    try:
        core = EngineCore(config, checkpoint, send)
        try:
            send(Ready(info=core.info))
            if built is not None:
                built()
            core.run(poll, rest)
        finally:
            core.close()
    except Exception as error:
        send(Failed(error=str(error), kind=type(error).__name__, trace=traceback.format_exc()))
        raise


# The engine in a process of its own


class EngineProcess(EngineLink):
    """Starts the engine process at once; it imports torch and loads weights while this process does its own part."""

    def __init__(self, config: Config) -> None:
        self.started = perf_counter()
        self._pipe = DoorPipe()
        theirs = self._pipe.theirs.fileno()
        order = {"config": config.flat(), "pipe": theirs, "parent": os.getpid()}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "phloem.launch"],
            stdin=subprocess.PIPE,
            env=child_environment(MALLOC),
            pass_fds=[theirs],
        )
        self._pipe.theirs.close()  # its only other end is the engine's: its end is ours to see
        assert self._process.stdin is not None
        self._process.stdin.write(msgspec.json.encode(order) + b"\n")
        self._process.stdin.flush()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def send(self, message: ToEngine) -> None:
        if not self.alive:
            raise EngineDead(self._reason())
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

    def _reason(self) -> str:
        return f"the engine process {_describe_exit(self._process.poll())}"

    def close(self) -> None:
        """End the process, by force if it has not ended by itself."""
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
        return f"was killed by {signal.Signals(-code).name}"
    return f"ended with exit status {code}"


def engine_main() -> int:
    """The engine process: reads its order from standard input, serves, ends with its parent."""
    order = msgspec.json.decode(sys.stdin.buffer.readline())
    die_with_parent(order["parent"])
    # Both may reach the whole process group at once; what they mean is the door's to decide, and it ends us.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    start = perf_counter()
    config = Config.from_flat(order["config"])
    log.configure(config.server.log_level, "engine")
    pipe = EnginePipe(order["pipe"])

    def send(message: FromEngine) -> None:
        pipe.send(encode(message))

    def poll(timeout: float | None) -> list[ToEngine]:
        found: list[ToEngine] = []
        try:
            frames = pipe.poll(timeout)
        except EOFError:
            from phloem.scheduler.loop import InboxClosed

            raise InboxClosed from None
        for data in frames:
            try:
                found.append(decode_to_engine(data))
            except msgspec.ValidationError:
                _log.exception("a message from the door was not understood and is dropped")
        return found

    try:
        import torch

        from phloem.utils import memory

        send(Progress(phase="imports", seconds=perf_counter() - start))
        _log.debug("torch %s", torch.__version__)

        def settle() -> None:
            # A full collection looks through all that torch has made: a tenth of a second between two tokens.
            gc.freeze()
            linecache.clearcache()  # sources that torch looks through while it is imported
            _log.debug("%d MiB of libraries were for the start alone", memory.release_libraries() >> 20)

        _serve_core(config, _describe(config), send, poll, settle, memory.trim)
    except Exception as error:
        if not isinstance(error, _expected_errors()):
            _log.exception("the engine stops")
        return 1
    finally:
        pipe.close()
    return 0


def _describe(config: Config) -> Checkpoint:
    from phloem.checkpoint.describe import describe

    model = config.model
    return describe(model.model_path, model.load_format, model.revision, model.tokenizer_path)


def _expected_errors() -> tuple[type[Exception], ...]:
    from phloem.core.errors import PhloemError

    return (PhloemError,)


# The engine in this process


class EngineThread(EngineLink):
    """The engine in a thread of this process; `receive` runs in the event loop that first awaits it."""

    def __init__(self, config: Config, checkpoint: Checkpoint) -> None:
        self._inbox: queue.SimpleQueue[ToEngine] = queue.SimpleQueue()
        self._outbox: queue.SimpleQueue[FromEngine] = queue.SimpleQueue()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._news: asyncio.Event | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(config, checkpoint), name="phloem-engine", daemon=True)
        self._thread.start()

    def _run(self, config: Config, checkpoint: Checkpoint) -> None:
        try:
            _serve_core(config, checkpoint, self._send, self._poll)
        except Exception:
            _log.debug("the engine thread stops", exc_info=True)  # the door was told
        finally:
            self._ended.set()
            self._wake()

    def _send(self, message: FromEngine) -> None:
        self._outbox.put(message)
        self._wake()

    def _wake(self) -> None:
        loop, news = self._loop, self._news
        if loop is not None and news is not None:
            with contextlib.suppress(RuntimeError):  # the loop has been closed
                loop.call_soon_threadsafe(news.set)

    def _poll(self, timeout: float | None) -> list[ToEngine]:
        found: list[ToEngine] = []
        try:
            found.append(self._inbox.get(timeout=timeout) if timeout != 0 else self._inbox.get_nowait())
            while True:
                found.append(self._inbox.get_nowait())
        except queue.Empty:
            return found

    @property
    def alive(self) -> bool:
        return not self._ended.is_set()

    def send(self, message: ToEngine) -> None:
        if not self.alive:
            raise EngineDead("the engine has stopped")
        self._inbox.put(message)

    async def receive(self) -> FromEngine:
        if self._news is None:
            self._news = asyncio.Event()
            self._loop = asyncio.get_running_loop()
        while True:
            # Cleared before the look: a message that comes in between sets it again.
            self._news.clear()
            try:
                return self._outbox.get_nowait()
            except queue.Empty:
                if not self.alive:
                    raise EngineDead("the engine has stopped") from None
            await self._news.wait()

    def close(self, timeout: float = 30.0) -> None:
        end = monotonic() + timeout
        self._thread.join(max(0.0, end - monotonic()))


if __name__ == "__main__":
    sys.exit(engine_main())
