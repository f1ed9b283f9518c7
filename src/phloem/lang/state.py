"""The states that programs work on: `s`, and groups of forked ones."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from phloem.core.errors import BadRequest
from phloem.lang.interpreter import Executor
from phloem.lang.ir import Text
from phloem.lang.turns import Turns

GATHER = "gather_variable"
CONCATENATE = "concate_and_append"  # as SGLang spells it
_JOINS = {GATHER: GATHER, CONCATENATE: CONCATENATE, "concatenate_and_append": CONCATENATE}


class ProgramState(Turns):
    """What a program appends to and reads from. Appending does not wait for the model; reading does."""

    def __init__(self, executor: Executor) -> None:
        self.stream_executor = executor
        self.ret_value: Any = None  # what the program returned
        self.seconds: float | None = None  # how long it ran

    # appending

    def __iadd__(self, other: Any) -> ProgramState:
        if other is None:
            raise BadRequest("None was appended to a program's state")
        if isinstance(other, ProgramState):
            self._take(other)
        else:
            self.stream_executor.submit(other)
        return self

    def _take(self, other: ProgramState) -> None:
        """Another state's text since it was forked, and the variables that this one has not."""
        added = other.stream_executor.added()
        self.stream_executor.sync()
        mine, theirs = self.stream_executor.content, other.stream_executor.content
        for name, value in theirs.variables.items():
            if name not in mine.variables:
                self.stream_executor.set_variable(name, value)
                if name in theirs.meta:
                    mine.meta[name] = theirs.meta[name]
        if added:
            self.stream_executor.submit(Text(added))

    def _append(self, node: Any) -> None:
        self.stream_executor.submit(node)

    # reading

    def __getitem__(self, name: str) -> Any:
        return self.stream_executor.variable(name)

    def __setitem__(self, name: str, value: Any) -> None:
        self.stream_executor.set_variable(name, value)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self.stream_executor.expects(name)

    def get_var(self, name: str) -> Any:
        return self[name]

    def set_var(self, name: str, value: Any) -> None:
        self[name] = value

    def get_meta_info(self, name: str) -> Any:
        """What the backend told about a variable's call: tokens, cached tokens, why it ended, log-probabilities."""
        self.stream_executor.variable(name)
        return self.stream_executor.content.meta.get(name, {})

    def text(self) -> str:
        """All text so far, prompts included; of a failed state that up to the failure."""
        self.stream_executor.sync()
        return self.stream_executor.content.text

    def messages(self) -> list[dict[str, Any]]:
        """The ended turns, in OpenAI's shape."""
        self.stream_executor.sync()
        return list(self.stream_executor.content.messages)

    def sync(self) -> None:
        """Wait for everything that was appended."""
        self.stream_executor.sync()

    def error(self) -> Exception | None:
        """Why this state failed, or None."""
        self.stream_executor.sync()
        return self.stream_executor.error

    # streaming

    def _piece(self, name: str | None, seen: int) -> tuple[str, bool]:
        """(what is new, whether that is all)."""
        executor = self.stream_executor
        over = executor.ended(name)  # looked at first: what comes after it is not missed
        if name is None:
            whole = executor.content.text
        else:
            value = executor.content.variables.get(name, executor.partial.get(name, ""))
            whole = value if isinstance(value, str) else str(value)
        return whole[seen:], over

    def text_iter(self, var_name: str | None = None) -> Iterator[str]:
        """Text (or one variable's) as it comes, where the program runs with `stream=True`.

        Raises:
            ProgramError: at the end, when the state has failed.
        """
        executor, seen = self.stream_executor, 0
        while True:
            executor.wait(lambda begin=seen: any(self._piece(var_name, begin)))
            new, over = self._piece(var_name, seen)
            seen += len(new)
            if new:
                yield new
            elif over:
                executor.check()
                return

    def stream(self, var_name: str | None = None) -> Iterator[str]:
        """The same as `text_iter`."""
        return self.text_iter(var_name)

    async def text_async_iter(self, var_name: str | None = None, return_meta_data: bool = False) -> AsyncGenerator[Any]:
        """`text_iter` for event loops. With `return_meta_data` pairs (text, meta information so far)."""
        executor, seen = self.stream_executor, 0
        loop, news = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            loop.call_soon_threadsafe(news.set)

        end = executor.watch(wake)
        try:
            while True:
                news.clear()
                new, over = self._piece(var_name, seen)
                seen += len(new)
                if new:
                    meta = executor.content.meta.get(var_name, {}) if var_name is not None else {}
                    yield (new, meta) if return_meta_data else new
                elif over:
                    executor.check()
                    return
                else:
                    await news.wait()
        finally:
            end()

    def __aiter__(self) -> AsyncGenerator[Any]:
        return self.text_async_iter()

    # copies

    def fork(self, size: int = 1, position_ids_offset: list[int] | None = None) -> ProgramStateGroup:
        """`size` copies that go on side by side; what they share is computed once.

        `position_ids_offset` is read for compatibility: positions follow from the text.
        """
        return ProgramStateGroup([ProgramState(item) for item in self.stream_executor.fork(size)], self)

    @contextmanager
    def copy(self, position_ids_offset: list[int] | None = None) -> Generator[ProgramState]:
        """A copy for the time of a `with` block."""
        group = self.fork(1, position_ids_offset)
        yield group[0]
        group[0].stream_executor.finish()

    def __repr__(self) -> str:
        return f"ProgramState({self.text()!r:.200})"


class ProgramStateGroup:
    """Forked states. Join them to bring what they found back to where they were forked."""

    def __init__(self, states: list[ProgramState], source: ProgramState | None = None) -> None:
        self.states = states
        self.src_state = source

    def join(self, mode: str = GATHER) -> None:
        """Wait for all.

        `gather_variable`: each variable that the copies set becomes a list in the source. `concate_and_append`: the
        text that each added is appended to the source, in order.

        Raises:
            ProgramError: a copy has failed.
        """
        if mode not in _JOINS:
            raise BadRequest(f"join mode must be one of {', '.join(_JOINS)}, got {mode!r}")
        if self.src_state is None:
            raise BadRequest("this group was not forked from a state")
        for state in self.states:
            state.stream_executor.finish()
        for state in self.states:
            state.stream_executor.check()
        if _JOINS[mode] == GATHER:
            self._gather(self.src_state)
        else:
            for state in self.states:
                self.src_state += state

    def _gather(self, source: ProgramState) -> None:
        source.stream_executor.sync()
        before = dict(source.stream_executor.content.variables)
        gathered: dict[str, list[Any]] = {}
        metas: dict[str, list[Any]] = {}
        for state in self.states:
            content = state.stream_executor.content
            for name, value in content.variables.items():
                if name not in before or value is not before[name]:
                    gathered.setdefault(name, []).append(value)
                    metas.setdefault(name, []).append(content.meta.get(name, {}))
        for name, values in gathered.items():
            source.stream_executor.content.meta[name] = metas[name]
            source.stream_executor.set_variable(name, values)

    def __getitem__(self, index: int) -> ProgramState:
        return self.states[index]

    def __setitem__(self, index: int, value: ProgramState) -> None:
        if self.states[index] is not value:
            raise BadRequest("a group's states cannot be replaced")  # `forks[i] += x` assigns the same one

    def __len__(self) -> int:
        return len(self.states)

    def __iter__(self) -> Iterator[ProgramState]:
        return iter(self.states)

    def __iadd__(self, other: Any) -> ProgramStateGroup:
        """One expression for all, a function of the index, or a list with one for each."""
        if isinstance(other, Sequence) and not isinstance(other, str):
            if len(other) != len(self.states):
                raise BadRequest(f"{len(other)} items were appended to a group of {len(self.states)} states")
            items = list(other)
        elif callable(other):
            make: Callable[[int], Any] = other
            items = [make(index) for index in range(len(self.states))]
        else:
            items = [other] * len(self.states)
        for state, item in zip(self.states, items, strict=True):
            state += item
        return self
