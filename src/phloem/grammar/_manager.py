"""Grammars by request: compiled off the loop in a bounded pool, cached, and followed token by token.

A request whose grammar compiles waits (`Prepared.ready`) and delays nobody. Two cursors follow it: the runner's, which
`mask` moves in the runner's thread, and the scheduler's, which `jump` moves when tokens are committed. They share the
compiled grammar and no state, so neither waits for the other.

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
from phloem.grammar import _base, _nodes
from phloem.grammar._thinking import (
    CLOSED,
    OPEN,
    ThinkingMarkers,
    ThinkingMatcher,
    clear_bit,
    is_content,
    last_header,
    state_after,
)
from phloem.utils.registry import Registry

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from phloem.core.messages import Submit
    from phloem.core.request import SamplingParams
    from phloem.grammar._base import Compiled, Constraint, Engine, EngineKind, Matcher, Vocabulary, Whitespace

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

MAX_JUMP = 256  # forced tokens at once
_SLOW_MASK = 1.0  # seconds of CPU for a single mask
_SLOW_MEAN = 0.05  # and on average, once there were enough of them
_ENOUGH = 32


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
        self, vocabulary: Vocabulary | Callable[[], Vocabulary], settings: GrammarSettings | None = None
    ) -> None:
        self._vocabulary = vocabulary
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
            return Prepared(self, _failed(error), params, prompt_ids, jump=False, thinking=None)
        if constraint is None:
            return None
        # A forced token is never sampled: it has no logprobs, and the sampler's penalties would not count it.
        penalised = (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) != (1.0, 0.0, 0.0)
        looked_at = submit.return_logprob or penalised or bool(params.processors) or submit.return_hidden
        jump = self.settings.jump_forward and not looked_at
        thinking = None if submit.grammar_at_once else self.settings.thinking
        return Prepared(self, self._entry(constraint), params, prompt_ids, jump=jump, thinking=thinking)

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
            entry.started = time.monotonic()
            compiled = engine.compile(constraint)
            entry.seconds = time.monotonic() - entry.started
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


class _Cursor:
    """A matcher and the tokens it has taken."""

    def __init__(self, matcher: Matcher, eos_ids: Sequence[int]) -> None:
        self.matcher = matcher
        self.taken: list[int] = []
        self._eos_ids = eos_ids
        self._ends = 0  # end-of-text tokens after the first, which a matcher does not take

    def extend(self, ids: Sequence[int]) -> None:
        """
        Raises:
            BadRequest: if the grammar goes over a limit.
            PhloemError: if a token does not fit, which the mask before it should have kept out.
        """
        if not ids:
            return
        taken = self.matcher.accept(ids) if not self._ends else 0
        for token in ids[taken:]:
            if token not in self._eos_ids or not self.matcher.done:
                raise PhloemError(f"token {token} at output position {len(self.taken)} does not fit the grammar")
            self._ends += 1
        self.taken.extend(ids)

    def move_to(self, ids: Sequence[int]) -> None:
        """Be where exactly these output tokens lead, whatever was taken before."""
        same = 0
        for mine, other in zip(self.taken, ids, strict=False):
            if mine != other:
                break
            same += 1
        back = len(self.taken) - same
        if back:
            self.matcher.rollback(max(0, back - self._ends))
            self._ends = max(0, self._ends - back)
            del self.taken[same:]
        self.extend(ids[same:])


class Prepared:
    """A constrained request as the scheduler sees it.

    `admit(output)` before each admission; `mask` goes into `Admission.mask`; `jump(output)` at each commit, and
    `advance(output)` once its tokens are appended, which needs that no launched step of the request is uncommitted.
    A request keeps it over preemption: state is by output tokens, not by slot.
    """

    def __init__(
        self,
        manager: GrammarManager,
        entry: _Entry,
        params: SamplingParams,
        prompt_ids: Sequence[int] | NDArray[np.int32],
        jump: bool,
        thinking: ThinkingMarkers | None,
    ) -> None:
        self._manager = manager
        self._thinking = thinking
        self._timeout = manager.settings.compile_timeout
        self._entry = entry
        self._params = params
        self._field = _base.field_of(params)
        prompt = [int(i) for i in prompt_ids] if thinking is not None else []
        channel = thinking.channel if thinking is not None else None
        self._header = last_header(prompt, channel) if channel is not None else []
        self._prompt_state = CLOSED if thinking is None else state_after(prompt, thinking)
        self.can_jump = jump
        self._jumper: _Cursor | None = None
        self._masker: _Cursor | None = None
        self._moved: list[int] | None = None  # output that the runner's cursor must move to before its next mask
        self._buffer: NDArray[np.int32] | None = None
        self._masks = 0
        self._seconds = 0.0

    @property
    def _vocabulary(self) -> Vocabulary:
        return self._manager.vocabulary

    def ready(self) -> bool:
        """Whether compiling has ended, well or not, or has taken too long."""
        return self._entry.future.done() or self._late()

    @property
    def error(self) -> PhloemError | None:
        """Why the request cannot run; None while it may."""
        if self._entry.future.done():
            error = self._entry.future.exception()
            if isinstance(error, BadRequest) and error.param is None:
                return BadRequest(f"{self._field}: {error.message}", param=self._field)
            if error is None or isinstance(error, PhloemError):
                return error
            return BadRequest(f"the grammar could not be compiled: {error}")
        if self._late():
            return BadRequest(f"the grammar could not be compiled within {self._timeout:g} s")
        return None

    @property
    def engine(self) -> str:
        return self._entry.future.result().engine

    def admit(self, output: Sequence[int]) -> None:
        """The request enters a slot, for the first time or again, with this output."""
        self._moved = list(output)

    def mask(self, sampled: list[int]) -> NDArray[np.int32] | None:
        """Allowed tokens after those `sampled` since the last call, `[ceil(vocab / 32)]` int32.

        Called in the runner's thread. The array is this request's own and is written again by the next call.
        When the text is complete and cannot go on, only end-of-text tokens are allowed: with `ignore_eos` the request
        repeats them up to its length limit. `min_new_tokens` is kept here, as far as the grammar can go on: the
        runner must not forbid those tokens itself (leave `Admission.eos_ids` empty).

        Raises:
            BadRequest: if the grammar gets stuck or goes over a limit: fails this request alone.
            PhloemError: if a token does not fit.
        """
        try:
            return self._mask(sampled)
        except BadRequest as error:
            raise BadRequest(f"{self._field}: {error.message}", param=self._field) from None

    def _mask(self, sampled: list[int]) -> NDArray[np.int32]:
        if self._masker is None:
            self._masker = self._cursor()
            self._buffer = self._vocabulary.new_mask()
        moved, self._moved = self._moved, None
        start = time.thread_time()
        if moved is not None:
            # No step was in flight when the scheduler moved the request, so `sampled` is part of it.
            self._masker.move_to(moved)
        else:
            self._masker.extend(sampled)
        assert self._buffer is not None
        self._masker.matcher.fill(self._buffer)
        if not self._buffer.any():
            raise BadRequest("the grammar admits no text that goes on from here")
        if len(self._masker.taken) < self._params.min_new_tokens:
            self._forbid_end(self._buffer)
        self._count(time.thread_time() - start)
        return self._buffer

    def jump(self, output: Sequence[int]) -> list[int]:
        """Tokens that must follow `output`, an end-of-text token included where the text is complete.

        Appended to the output as known and not computed, they are prefilled in one step; tell `advance` then.
        Called in the scheduler's thread. Empty where nothing is forced, and always with `can_jump` False.

        Raises:
            BadRequest: as `mask`.
        """
        try:
            return self._jump(output)
        except BadRequest as error:
            raise BadRequest(f"{self._field}: {error.message}", param=self._field) from None

    def _jump(self, output: Sequence[int]) -> list[int]:
        if not self.can_jump or self._entry.future.exception() is not None:
            return []
        if self._jumper is None:
            self._jumper = self._cursor()
        cursor = self._jumper
        try:
            cursor.move_to(output)
        except PhloemError:
            return []  # the runner's cursor reports it
        room = MAX_JUMP
        if self._params.max_new_tokens is not None:
            room = min(room, self._params.max_new_tokens - len(output))
        if room <= 0 or (cursor.taken and cursor.taken[-1] in self._vocabulary.eos_ids):
            return []
        forced = cursor.matcher.jump()[:room]
        cursor.extend(forced)
        enough = len(cursor.taken) >= self._params.min_new_tokens
        if cursor.matcher.done and len(forced) < room and enough and not self._params.ignore_eos:
            forced = [*forced, self._vocabulary.eos_ids[0]]
        return forced

    def advance(self, output: Sequence[int]) -> None:
        """The output is now this, forced tokens included, and no launched step of the request is uncommitted."""
        self._moved = list(output)

    def _late(self) -> bool:
        started = self._entry.started
        return started is not None and time.monotonic() - started > self._timeout + 1.0

    def _cursor(self) -> _Cursor:
        matcher = self._entry.future.result().matcher()
        if self._thinking is not None:
            state, channel = self._prompt_state, self._thinking.channel
            if channel is not None:
                state = CLOSED if is_content(self._header, channel, self._vocabulary) else OPEN
            if state != CLOSED:
                matcher = ThinkingMatcher(matcher, self._thinking, state, self._vocabulary)
        return _Cursor(matcher, self._vocabulary.eos_ids)

    def _forbid_end(self, mask: NDArray[np.int32]) -> None:
        kept = mask.copy()
        for token in self._vocabulary.eos_ids:
            clear_bit(mask, token)
        if not mask.any():
            mask[:] = kept

    def _count(self, seconds: float) -> None:
        self._masks += 1
        self._seconds += seconds
        slow = self._masks >= _ENOUGH and self._seconds / self._masks > _SLOW_MEAN
        if seconds > _SLOW_MASK or slow:
            raise BadRequest("the grammar is too slow to follow: simplify it")


__all__ = ["GrammarManager", "GrammarSettings", "Prepared", "ThinkingMarkers"]
