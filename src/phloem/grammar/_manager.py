"""Grammars by request: compiled off the loop in a bounded pool, cached, and followed token by token.

A request whose grammar compiles waits (`Compiling`) and delays nobody; what follows it then is in `_follow`.

Limits: a constraint's size and repetition counts (`_base`), a schema's depth and nodes (`_schema`), fuel, states and
items of the lexer and the parser (`llguidance`), a child process with a time and memory limit that is killed
(`xgrammar`), and CPU time per mask (here). So whatever a client sends ends in a grammar or in a clear error.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from phloem.core.errors import BadRequest, PhloemError, QueueFull
from phloem.core.late import Prepared
from phloem.grammar import _base, _nodes
from phloem.grammar._follow import Constrained
from phloem.grammar._thinking import Thinking, ThinkingMarkers
from phloem.utils.registry import Registry

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from phloem.core.messages import Submit
    from phloem.core.request import SamplingParams
    from phloem.grammar._base import Compiled, Constraint, Engine, EngineKind, Vocabulary, Whitespace

ENGINES: Registry[EngineKind] = Registry("phloem.grammar", "grammar engine", "Engine")

# Who is asked first. JSON schemas: exactness; EBNF: the engine whose notation it is.
_EXACT = ("llguidance", "xgrammar")
ORDER: dict[type, tuple[str, ...]] = {
    _base.JsonSchema: _EXACT,
    _base.JsonObject: _EXACT,
    _base.Regex: _EXACT,
    _base.Choice: _EXACT,
    _base.Lark: _EXACT,
    _base.Union: _EXACT,
    _base.StructuralTag: _EXACT,
    **dict.fromkeys((_nodes.Literal, _nodes.Text, _nodes.Sequence, _nodes.Optional, _nodes.Repeat), _EXACT),
    **dict.fromkeys((_nodes.Members, _nodes.Tag), _EXACT),
    _base.TagFormat: ("xgrammar", "llguidance"),
    _base.Ebnf: ("xgrammar", "llguidance"),
}


@dataclass(frozen=True)
class GrammarSettings:
    """`backend` pins an engine by name. Times in seconds, sizes in bytes."""

    backend: str | None = None
    whitespace: Whitespace = "compact"
    jump_forward: bool = True
    compile_timeout: float = 10.0
    memory_limit: int = 1 << 31
    workers: int = 2
    max_pending: int = 256
    cache_entries: int = 256
    cache_bytes: int = 256 << 20
    thinking: ThinkingMarkers | None = None


class _Entry:
    """One constraint's compilation, shared by all who wait for it."""

    def __init__(self) -> None:
        self.started: float | None = None
        self.seconds = 0.0
        self.future: Future[Compiled] = Future()


class GrammarManager:
    """Owns engines, pool and cache. `vocabulary` is asked for in the pool, when the first constraint comes.

    Raises:
        ConfigError: if the pinned engine is unknown.
    """

    def __init__(
        self,
        vocabulary: Vocabulary | Callable[[], Vocabulary],
        settings: GrammarSettings | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._vocabulary = vocabulary
        self._clock = clock
        self.settings = settings or GrammarSettings()
        if self.settings.backend is not None and self.settings.backend not in ENGINES.names():
            ENGINES.module(self.settings.backend)  # raises, with the right names
        self._engines: dict[str, Engine] = {}
        self._engine_lock = threading.Lock()
        self._lock = threading.Lock()
        self._cache: OrderedDict[str, _Entry] = OrderedDict()
        self._pending = 0
        self._pool = ThreadPoolExecutor(self.settings.workers, thread_name_prefix="phloem-grammar")
        self.compile_seconds: list[float] = []  # of compilations that nobody has asked about yet

    def take_compile_seconds(self) -> list[float]:
        """How long each compilation took that has ended since the last call. Any thread may call it."""
        taken = self.compile_seconds[:]
        del self.compile_seconds[: len(taken)]  # others append behind
        return taken

    @cached_property
    def vocabulary(self) -> Vocabulary:
        return self._vocabulary() if callable(self._vocabulary) else self._vocabulary

    def prepare(self, submit: Submit, prompt_ids: Sequence[int] | NDArray[np.int32]) -> Prepared | None:
        """What the scheduler holds of a constrained request; None for an unconstrained one. Never raises."""
        params = submit.sampling
        try:
            constraint = _base.constraint_of(params)
        except PhloemError as error:
            return Prepared((self._compiling(_failed(error), params),))
        if constraint is None:
            return None
        # A forced token is never sampled: it has no logprobs, and the sampler's penalties would not count it.
        penalised = (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) != (1.0, 0.0, 0.0)
        looked_at = submit.return_logprob or penalised or bool(params.processors) or submit.return_hidden
        jump = self.settings.jump_forward and not looked_at
        markers = None if submit.grammar_at_once else self.settings.thinking
        thinking = None if markers is None else Thinking.of([int(i) for i in prompt_ids], markers)
        entry = self._entry(constraint)
        constrained = Constrained(entry.future.result, lambda: self.vocabulary, params, jump, thinking)
        return Prepared((self._compiling(entry, params),), constrained)

    def _compiling(self, entry: _Entry, params: SamplingParams) -> Compiling:
        return Compiling(entry, _base.name_of(params), self.settings.compile_timeout, self._clock)

    def compile(self, constraint: Constraint) -> Compiled:
        """Compile here and now (or take from the cache), for callers that may wait.

        Raises:
            PhloemError: as the engines do.
        """
        return self._entry(constraint).future.result()

    def decisions(self) -> dict[str, str]:
        """Kind of constraint -> the engines that are asked for it, in order."""
        pinned = self.settings.backend
        return {kind.__name__: pinned or " > ".join(order) for kind, order in ORDER.items()}

    def decision(self) -> tuple[str, str, str]:
        """Name, value and reason, as the choices at start are told."""
        if self.settings.backend is not None:
            return "grammar_backend", self.settings.backend, "as asked"
        others = sorted({kind for kind, order in self.decisions().items() if not order.startswith(_EXACT[0])})
        return (
            "grammar_backend",
            _EXACT[0],
            f"enforces JSON schemas exactly; {ORDER[_base.Ebnf][0]} for {', '.join(others)}",
        )

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        for engine in self._engines.values():
            engine.close()

    def _entry(self, constraint: Constraint) -> _Entry:
        key = _base.fingerprint(constraint)
        with self._lock:
            entry = self._cache.get(key)
            if entry is not None:
                self._cache.move_to_end(key)
                return entry
            if self._pending >= self.settings.max_pending:
                return _failed(QueueFull(f"{self._pending} grammars are being compiled; try again"))
            entry = self._cache[key] = _Entry()
            self._pending += 1
        self._pool.submit(self._run, key, entry, constraint)
        return entry

    def _run(self, key: str, entry: _Entry, constraint: Constraint) -> None:
        keep = True
        try:
            engine = self._choose(constraint)
            entry.started = self._clock()
            compiled = engine.compile(constraint)
            entry.seconds = self._clock() - entry.started
            self.compile_seconds.append(entry.seconds)
            entry.future.set_result(compiled)
        except PhloemError as error:
            keep = "within" not in error.message  # a timeout may be the machine's fault
            entry.future.set_exception(error)
        except Exception as error:
            keep = False
            entry.future.set_exception(
                BadRequest(f"the grammar could not be compiled: {type(error).__name__}: {error}")
            )
        with self._lock:
            self._pending -= 1
            if not keep:
                self._cache.pop(key, None)
            self._shrink()

    def _shrink(self) -> None:
        """Forget the grammars that were not asked for longest. Those in use live on with their requests."""
        total = sum(_bytes_of(entry) for entry in self._cache.values())
        for key in list(self._cache):
            over = len(self._cache) > self.settings.cache_entries or total > self.settings.cache_bytes
            if not over or len(self._cache) == 1:
                return
            if self._cache[key].future.done():
                total -= _bytes_of(self._cache.pop(key))

    def _choose(self, constraint: Constraint) -> Engine:
        names = (self.settings.backend,) if self.settings.backend else ORDER[type(constraint)]
        reasons: list[str] = []
        for name in names:
            try:
                engine = self.engine(name)
            except ImportError as error:
                reasons.append(f"{name}: not installed ({error.name})")
                continue
            reason = engine.decline(constraint)
            if reason is None:
                return engine
            reasons.append(f"{name}: {reason}")
        raise BadRequest(f"no grammar engine takes this constraint: {'; '.join(reasons)}")

    def engine(self, name: str) -> Engine:
        """The engine of that name, made at its first use.

        Raises:
            ImportError: if its package is not installed.
        """
        with self._engine_lock:
            found = self._engines.get(name)
            if found is None:
                options = _base.EngineOptions(
                    self.settings.whitespace, self.settings.compile_timeout, self.settings.memory_limit
                )
                found = self._engines[name] = ENGINES.get(name)(self.vocabulary, options)
            return found


def _bytes_of(entry: _Entry) -> int:
    done = entry.future.done() and entry.future.exception() is None
    return entry.future.result().num_bytes if done else 0


def _failed(error: PhloemError) -> _Entry:
    entry = _Entry()
    entry.future.set_exception(error)
    return entry


class Compiling:
    """A constraint on its way: what a request waits for."""

    def __init__(self, entry: _Entry, name: str | None, timeout: float, clock: Callable[[], float]) -> None:
        self._entry = entry
        self._field = name
        self._timeout = timeout
        self._clock = clock

    def ready(self) -> bool:
        """Whether compiling has ended, well or not, or has taken too long."""
        return self._entry.future.done() or self._overdue()

    @property
    def error(self) -> PhloemError | None:
        """Why the request cannot run; None while it may."""
        if self._entry.future.done():
            error = self._entry.future.exception()
            if isinstance(error, BadRequest) and error.param is None:
                return self._refused(error.message)
            if error is None or isinstance(error, PhloemError):
                return error
            return self._refused(f"the grammar could not be compiled: {error}")
        if self._overdue():
            return self._refused(f"the grammar could not be compiled within {self._timeout:g} s")
        return None

    def _refused(self, reason: str) -> BadRequest:
        return BadRequest(f"{self._field}: {reason}", param=self._field)

    @property
    def engine(self) -> str:
        return self._entry.future.result().engine

    def _overdue(self) -> bool:
        started = self._entry.started
        return started is not None and self._clock() - started > self._timeout + 1.0


__all__ = ["Compiling", "GrammarManager", "GrammarSettings", "ThinkingMarkers"]
