"""Runs what a program appends to a state, in order and, where the model is asked, in the background.

A state has a queue. Text is appended at once when nothing waits in front of it; a call of the model starts a thread
that works until the queue is empty. Reading a variable or the text waits for what it needs. An error stops the state:
what was still queued is dropped, and whoever reads gets the error.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from phloem.core.errors import BadRequest, PhloemError
from phloem.lang.backends._base import Backend, Prompt, media_object
from phloem.lang.choices import token_length_normalized
from phloem.lang.ir import (
    REASONING,
    Expr,
    Gen,
    Media,
    RoleBegin,
    RoleEnd,
    Sampling,
    ScopeBegin,
    ScopeEnd,
    Select,
    Text,
    Thinking,
    Variable,
    names_in,
    parts_of,
)
from phloem.text import formats as parsers

COMMIT_CHARACTERS = 256  # a fork's prefix is computed first when at least this much of it may not be cached
SPECULATION_TRIES = 3
_SLOW = (Gen, Select, Thinking)


class ProgramError(PhloemError):
    """A program's state has failed; `__cause__` is the reason."""


class PrefixEnd(Exception):
    """Raised in a run that only collects the text in front of the first call of the model."""


@dataclass
class Content:
    """What a state holds; a fork begins with a copy."""

    text: str = ""
    messages: list[dict[str, Any]] = field(default_factory=list)
    media: list[Media] = field(default_factory=list)
    places: list[int] = field(default_factory=list)  # where each medium's mark stands in `text`
    variables: dict[str, Any] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)
    role: str | None = None
    before: str | None = None  # the role of the last turn that was ended
    turn_start: int = 0  # where the open turn's content begins in `text`
    turn_media: int = 0
    scopes: dict[str, int] = field(default_factory=dict)
    computed: int = 0  # this much of `text` was part of a request

    def copy(self) -> Content:
        return replace(
            self,
            messages=list(self.messages),
            media=list(self.media),
            places=list(self.places),
            variables=dict(self.variables),
            meta=dict(self.meta),
            scopes=dict(self.scopes),
        )

    def turn_content(self, marks: Callable[[str], str]) -> str | list[dict[str, Any]]:
        """The open turn's content, in OpenAI's shape. `marks`: what stands for a medium of a kind in the text."""
        at, parts = self.turn_start, list[dict[str, Any]]()
        for item, place in zip(self.media[self.turn_media :], self.places[self.turn_media :], strict=True):
            if place > at:
                parts.append({"type": "text", "text": self.text[at:place]})
            parts.append({"type": f"{item.kind}_url", f"{item.kind}_url": media_object(item)})
            at = place + len(marks(item.kind))
        if not parts:
            return self.text[at:]
        if at < len(self.text):
            parts.append({"type": "text", "text": self.text[at:]})
        return parts


@dataclass
class Settings:
    """What all states of one run share."""

    backend: Backend
    sampling: Sampling
    stream: bool = False
    threads: bool = True
    spec_tokens: int | None = None
    prefix_only: bool = False


class Executor:
    """One state's queue and what has come of it. Appending is for one thread at a time; reading for any."""

    def __init__(self, settings: Settings, content: Content | None = None) -> None:
        self.settings = settings
        self.content = content if content is not None else Content()
        self.fork_start = len(self.content.text)
        self.children: weakref.WeakSet[Executor] = weakref.WeakSet()
        self.error: Exception | None = None
        self.done = False  # nothing more will be appended
        self.partial: dict[str, str] = {}  # variables that are being streamed
        self.watchers: list[Callable[[], None]] = []
        self._news = threading.Condition()
        self._queue: deque[Expr] = deque()
        self._busy = False
        self._expected: set[str] = set()
        self._thinking: Any = None  # the reasoning parser of the calls that are being executed
        self._ahead = ""  # text that the model wrote beyond what was asked

    # --- the appending side

    def submit(self, item: Any) -> None:
        """Append text or an expression. After an error nothing is appended any more."""
        parts = parts_of(item)
        with self._news:
            if self.error is not None:
                return
            self._expected.update(names_in(parts))
            self._queue.extend(parts)
            if self._busy:
                return
            self._busy = True
            slow = self.settings.threads and any(isinstance(part, _SLOW) for part in self._queue)
        if slow:
            threading.Thread(target=self._drain, name="phloem-program", daemon=True).start()
        else:
            self._drain()

    def _drain(self) -> None:
        while True:
            with self._news:
                if not self._queue or self.error is not None:
                    self._queue.clear()
                    self._busy = False
                    self._tell()
                    return
                item = self._queue.popleft()
            try:
                self._execute(item)
            except PrefixEnd:
                with self._news:
                    self._queue.clear()
                    self._busy = False
                raise
            except Exception as error:
                self.fail(error)

    def fail(self, error: Exception, quiet: bool = False) -> None:
        """Stop this state. The first error counts; one that nobody is going to raise is warned of."""
        with self._news:
            if self.error is None:
                self.error = error
                if not (quiet or isinstance(error, ProgramError)):
                    warnings.warn(f"a program's state failed: {type(error).__name__}: {error}", stacklevel=2)
            self._tell()

    def finish(self) -> None:
        """The program has ended; what its copies still do is waited for."""
        self.sync()
        for child in list(self.children):
            child.finish()
        with self._news:
            self.done = True
            self._tell()

    # --- the reading side

    def _tell(self) -> None:
        self._news.notify_all()
        for watcher in list(self.watchers):
            watcher()

    def wait(self, condition: Callable[[], bool], timeout: float | None = None) -> bool:
        """Until the condition holds; it is looked at whenever something was appended."""
        with self._news:
            return self._news.wait_for(condition, timeout)

    def watch(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Call back at every news, from whatever thread has it. Gives a function that ends this."""
        with self._news:
            self.watchers.append(callback)

        def end() -> None:
            with self._news:
                self.watchers.remove(callback)

        return end

    def sync(self) -> None:
        """Wait until everything that was appended is there, or the state has failed."""
        self.wait(lambda: not self._busy)

    def check(self) -> None:
        """Raises ProgramError when the state has failed."""
        if self.error is not None:
            raise ProgramError(f"{type(self.error).__name__}: {self.error}") from self.error

    def variable(self, name: str) -> Any:
        """The value of a variable, once it is there.

        Raises:
            ProgramError: the state failed before.
            KeyError: no such variable was ever appended.
        """
        self.wait(lambda: name in self.content.variables or not self._busy)
        if name not in self.content.variables:
            self.check()
            known = ", ".join(self.content.variables) or "none"
            raise KeyError(f"the program has no variable {name!r}; it has: {known}")
        return self.content.variables[name]

    def expects(self, name: str) -> bool:
        return name in self.content.variables or name in self._expected

    def set_variable(self, name: str, value: Any) -> None:
        with self._news:
            self.content.variables[name] = value
            self._tell()

    def ended(self, name: str | None) -> bool:
        """Whether a stream of this variable (None: of the text) will grow no more."""
        if self.error is not None or self.done:
            return True
        return name is not None and name in self.content.variables

    # --- executing

    def _execute(self, item: Expr) -> None:
        content = self.content
        if isinstance(item, Text):
            self._append(item.value)
        elif isinstance(item, Gen):
            self._stop_at_prefix()
            self._generate(item)
        elif isinstance(item, Select):
            self._stop_at_prefix()
            self._select(item)
        elif isinstance(item, RoleBegin):
            self._begin_turn(item.role)
        elif isinstance(item, RoleEnd):
            self._end_turn(item.role)
        elif isinstance(item, Media):
            content.media.append(item)
            content.places.append(len(content.text))
            self._append(self.settings.backend.format.mark(item.kind))
        elif isinstance(item, Thinking):
            self._think(item)
        elif isinstance(item, ScopeBegin):
            content.scopes[item.name] = len(content.text)
        elif isinstance(item, ScopeEnd):
            self.set_variable(item.name, content.text[content.scopes.pop(item.name) :])
        elif isinstance(item, Variable):
            self._stop_at_prefix()
            raise BadRequest(f"{item.name!r} is known only in a trace, not in a run")
        else:
            raise BadRequest(f"{type(item).__name__} cannot be executed")

    def _stop_at_prefix(self) -> None:
        if self.settings.prefix_only:
            raise PrefixEnd

    def _think(self, item: Thinking) -> None:
        self._thinking = parsers.THINKING.get(parsers.thinking_format(item.parser))
        try:
            for part in item.items:
                self._execute(part)
        finally:
            self._thinking = None

    def _without_reasoning(self, name: str | None, text: str) -> str:
        """Take the reasoning out of what the model has just written."""
        if self._thinking is None:
            return text
        reasoning, rest = self._thinking(None).parse(text)
        with self._news:
            self.content.text = self.content.text[: len(self.content.text) - len(text)] + rest
            if name is not None:
                self.content.variables[name + REASONING] = reasoning
            self._tell()
        return rest

    def _append(self, text: str) -> None:
        if self._ahead:
            # A guess that does not begin with the program's own text was wrong.
            self._ahead = self._ahead[len(text) :] if self._ahead.startswith(text) else ""
        with self._news:
            self.content.text += text
            self._tell()

    def _begin_turn(self, role: str) -> None:
        content = self.content
        if content.role is not None:
            raise BadRequest(f"{role!r} begins inside the turn of {content.role!r}: turns cannot be nested")
        self._ahead = ""
        self._append(self.settings.backend.format.open(content.before, role))
        content.role = role
        content.turn_start, content.turn_media = len(content.text), len(content.media)

    def _end_turn(self, role: str) -> None:
        content = self.content
        if content.role != role:
            raise BadRequest(f"{role!r} ends, but the open turn is {content.role!r}")
        content.messages.append({"role": role, "content": content.turn_content(self.settings.backend.format.mark)})
        content.role, content.before = None, role
        self._ahead = ""
        self._append(self.settings.backend.format.close(role))

    def prompt(self) -> Prompt:
        content = self.content
        partial = content.text[content.turn_start :] if content.role is not None else ""
        return Prompt(content.text, list(content.messages), content.role, partial, list(content.media))

    def _generate(self, item: Gen) -> None:
        settings = self.settings
        sampling = item.sampling.over(settings.sampling)
        if settings.spec_tokens is not None and self._speculate(item, sampling):
            return
        if settings.stream:
            self._generate_stream(item, sampling)
            return
        text, meta = settings.backend.generate(self.prompt(), sampling)
        self._append(text[0] if isinstance(text, list) else text)
        if isinstance(text, str):
            text = self._without_reasoning(item.name, text)
        self._keep(item.name, text, meta)

    def _keep(self, name: str | None, value: Any, meta: Any) -> None:
        content = self.content
        content.computed = len(content.text)
        with self._news:
            if name is not None:
                content.meta[name] = meta
                content.variables[name] = value
            self._tell()

    def _generate_stream(self, item: Gen, sampling: Sampling) -> None:
        meta: dict[str, Any] = {}
        text = ""
        for piece, news in self.settings.backend.generate_stream(self.prompt(), sampling):
            meta = {**meta, **news}
            text += piece
            with self._news:
                self.content.text += piece
                if item.name is not None:
                    self.partial[item.name] = text
                    self.content.meta[item.name] = meta
                self._tell()
        self._keep(item.name, self._without_reasoning(item.name, text), meta)

    def _select(self, item: Select) -> None:
        backend = self.settings.backend
        decision = backend.select(self.prompt(), item.choices, item.method or token_length_normalized)
        self._append(decision.decision)
        self._keep(item.name, decision.decision, decision.meta_info)

    # --- speculative execution of API calls

    def _speculate(self, item: Gen, sampling: Sampling) -> bool:
        """Answer a call from text that an earlier one wrote in excess; False where that cannot be done.

        One call writes on past the stop; the program's next text is then compared with what it wrote, and the next
        call answered from behind it. Only calls that end at a stop string can be cut out of such text.
        """
        stops = sampling.stops()
        chat = self.settings.backend.chat_only
        bound = (sampling.n or 1) > 1 or sampling.regex or sampling.json_schema or sampling.ebnf
        if bound or not (stops or chat):
            self._ahead = ""
            return False
        if chat and not self._ahead and not self.prompt().partial and self._ends_turn():
            return False  # nothing to speculate about: an ordinary call gives the whole turn
        meta: dict[str, Any] = {"speculated": True}
        if not self._ahead:
            self._ahead, meta = self._write_ahead(sampling)
        cut, found = _first_stop(self._ahead, stops)
        if found is None and not chat:
            self._ahead = ""  # the stop is beyond the guess: ask for this one alone
            return False
        value, rest = self._ahead[:cut], self._ahead[cut:]
        self._ahead = ""
        self._append(value)
        self._ahead = rest
        self._keep(item.name, value, meta)
        return True

    def _ends_turn(self) -> bool:
        with self._news:
            return bool(self._queue) and isinstance(self._queue[0], RoleEnd)

    def _write_ahead(self, sampling: Sampling) -> tuple[str, dict[str, Any]]:
        backend, prompt = self.settings.backend, self.prompt()
        longer = replace(sampling, stop=None, max_new_tokens=self.settings.spec_tokens)
        if not backend.chat_only:
            return _single(backend.generate(prompt, longer))
        said, begun = "", prompt.partial
        for _ in range(SPECULATION_TRIES):
            said, meta = _single(backend.generate(replace(prompt, partial=""), longer))
            for text, start in ((said, begun), (said.strip(), begun.strip())):
                if text.startswith(start):
                    return text[len(start) :], meta
        raise PhloemError(f"the model's answer {said!r:.200} does not begin as the program's turn does: {begun!r:.200}")

    # --- copies

    def fork(self, count: int) -> list[Executor]:
        """Copies that go on by themselves. What they share is computed once, before they do."""
        self.sync()
        self.check()
        content, settings = self.content, self.settings
        if settings.prefix_only:
            raise PrefixEnd
        if count > 1 and len(content.text) - content.computed >= COMMIT_CHARACTERS and not content.media:
            self.settings.backend.cache_prefix(content.text)
            content.computed = len(content.text)
        found = [Executor(settings, content.copy()) for _ in range(count)]
        self.children.update(found)
        return found

    def added(self) -> str:
        """What this state appended since it was forked."""
        self.sync()
        self.check()
        return self.content.text[self.fork_start :]


def _single(answer: Any) -> tuple[str, dict[str, Any]]:
    text, meta = answer
    return (text[0], meta[0]) if isinstance(text, list) else (text, meta)


def _first_stop(text: str, stops: list[str]) -> tuple[int, str | None]:
    """(place, stop) of the first stop in a text; (its length, None) without one."""
    places = [(at, stop) for stop in stops if (at := text.find(stop)) >= 0]
    return min(places) if places else (len(text), None)
