"""`@function`: a Python function over a state, and the ways to run it."""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from phloem.core.errors import BadRequest
from phloem.lang.backends import as_backend
from phloem.lang.backends._base import Backend
from phloem.lang.interpreter import Executor, Settings
from phloem.lang.ir import RUN_DEFAULTS, SAMPLING_ALIASES, SAMPLING_NAMES, Variable, make_sampling
from phloem.lang.state import ProgramState
from phloem.lang.trace import TraceState, Unknown, common_prefix, leading_text

AUTO_THREADS = 64
PREFIX_CHARACTERS = 64  # a shorter common prefix of a batch is not worth a request
_SAMPLING = {*SAMPLING_NAMES, *SAMPLING_ALIASES, "dtype"}


class Function:
    """A program. Its first parameter is the state.

    `run`, `run_batch` and `bind` take the program's arguments, and beside them any sampling parameter: the default of
    every call of the model in this run. A name that is both belongs to the program.
    """

    def __init__(
        self,
        func: Callable[..., Any],
        num_api_spec_tokens: int | None = None,
        bind_arguments: dict[str, Any] | None = None,
    ) -> None:
        self.func = func
        self.num_api_spec_tokens = num_api_spec_tokens
        self.bind_arguments = bind_arguments or {}
        parameters = list(inspect.signature(func).parameters.values())
        if not parameters or parameters[0].name != "s":
            raise BadRequest(f"{func.__name__}: a program's first parameter is its state and must be named s")
        self.arg_names = [item.name for item in parameters[1:]]
        self.pin_prefix_rid = None
        functools.update_wrapper(self, func)

    def bind(self, **kwargs: Any) -> Function:
        """The program with some arguments set."""
        unknown = set(kwargs) - set(self.arg_names)
        if unknown:
            raise BadRequest(f"{self.func.__name__} has no argument {sorted(unknown)[0]!r}")
        return Function(self.func, self.num_api_spec_tokens, {**self.bind_arguments, **kwargs})

    def run(
        self, *args: Any, stream: bool = False, backend: Any = None, use_thread: bool = True, **kwargs: Any
    ) -> ProgramState:
        """Run once. With `stream` it comes back at once, for `text_iter`; errors are then in the state alone.

        Raises:
            Exception: whatever the program itself raises.
        """
        arguments, sampling = self._split(kwargs)
        settings = Settings(as_backend(backend), sampling, stream, use_thread, self.num_api_spec_tokens)
        executor = Executor(settings)
        state = ProgramState(executor)
        if not stream:
            self._play(state, args, arguments, quiet=True)
            return state

        def play() -> None:
            with contextlib.suppress(Exception):  # it is in the state
                self._play(state, args, arguments)

        threading.Thread(target=play, name="phloem-program", daemon=True).start()
        return state

    def _play(self, state: ProgramState, args: Sequence[Any], arguments: dict[str, Any], quiet: bool = False) -> None:
        begun = time.perf_counter()
        try:
            state.ret_value = self.func(state, *args, **arguments)
        except Exception as error:
            executor = state.stream_executor
            executor.sync()
            executor.fail(error, quiet)
            executor.finish()
            raise
        else:
            state.stream_executor.finish()
        finally:
            state.seconds = time.perf_counter() - begun

    def _split(self, kwargs: dict[str, Any]) -> tuple[dict[str, Any], Any]:
        """(the program's arguments, the run's sampling parameters)."""
        own = set(self.arg_names)
        sampling = {name: kwargs[name] for name in kwargs if name in _SAMPLING and name not in own}
        arguments = {name: value for name, value in kwargs.items() if name not in sampling}
        return {**self.bind_arguments, **arguments}, make_sampling(sampling).over(RUN_DEFAULTS)

    def run_batch(
        self,
        batch_kwargs: Sequence[Any],
        *,
        backend: Any = None,
        num_threads: int | str = "auto",
        progress_bar: bool = False,
        generator_style: bool = False,
        use_thread: bool = True,
        **kwargs: Any,
    ) -> list[ProgramState] | Generator[ProgramState]:
        """Run once for each dict of arguments (or tuple, in the order of the parameters); states in the same order.

        What all of them begin with is computed first. A program that fails sinks nothing else: its state has the error.
        `use_thread=False` makes every program wait for each of its calls where it makes it.
        """
        calls = [self._call(item) for item in batch_kwargs]
        found = as_backend(backend)
        _, sampling = self._split(kwargs)
        shared = {name: value for name, value in kwargs.items() if name not in _SAMPLING or name in self.arg_names}
        calls = [{**self.bind_arguments, **shared, **call} for call in calls]
        settings = Settings(found, sampling, threads=use_thread, spec_tokens=self.num_api_spec_tokens)
        threads = min(AUTO_THREADS if num_threads == "auto" else int(num_threads), max(len(calls), 1))
        if threads > 1:
            prefix = common_prefix(self.func, found, calls)
            if len(prefix) >= PREFIX_CHARACTERS:
                found.cache_prefix(prefix)
        states = self._states(calls, settings, threads, progress_bar)
        return states if generator_style else list(states)

    def _call(self, item: Any) -> dict[str, Any]:
        if isinstance(item, dict):
            return item
        values = item if isinstance(item, list | tuple) else (item,)
        free = [name for name in self.arg_names if name not in self.bind_arguments]
        if len(values) > len(free):
            raise BadRequest(f"{self.func.__name__} takes {len(free)} arguments, got {len(values)}")
        return dict(zip(free, values, strict=False))

    def _states(
        self, calls: list[dict[str, Any]], settings: Settings, threads: int, progress_bar: bool
    ) -> Generator[ProgramState]:
        with _progress(len(calls) if progress_bar else 0) as tick:
            if threads == 1:
                for call in calls:
                    yield tick(self._guarded(settings, call))
                return
            with ThreadPoolExecutor(threads, "phloem-batch") as pool:
                try:
                    futures: list[Future[ProgramState]] = [pool.submit(self._guarded, settings, call) for call in calls]
                    for future in futures:
                        future.add_done_callback(lambda _: tick(None))
                    for future in futures:
                        yield future.result()
                except BaseException:
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise

    def _guarded(self, settings: Settings, call: dict[str, Any]) -> ProgramState:
        """Run once; an error stays in the state."""
        state = ProgramState(Executor(settings))
        with contextlib.suppress(Exception):
            self._play(state, (), call)
        return state

    def trace(self, *, backend: Any = None, **kwargs: Any) -> TraceState:
        """Run without a model; arguments that are not given, and what the model would write, are placeholders."""
        arguments, _ = self._split(kwargs)
        for name in self.arg_names:
            arguments.setdefault(name, Variable(name))
        state = TraceState()
        self.func(state, **arguments)
        return state

    def cache(self, backend: Any = None, **kwargs: Any) -> str:
        """Compute what the program begins with, as far as it does not depend on arguments that are not given."""
        found = as_backend(backend)
        arguments, _ = self._split(kwargs)
        for name in self.arg_names:
            arguments.setdefault(name, Unknown(name))
        prefix = leading_text(self.func, found, arguments)
        if prefix:
            found.cache_prefix(prefix)
        return prefix

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run; or, where the first argument is a state, go on in that state."""
        if args and isinstance(args[0], ProgramState | TraceState):
            return self.func(*args, **{**self.bind_arguments, **kwargs})
        return self.run(*args, **kwargs)


class _progress:
    """A bar that counts finished programs; none for a total of 0. `tick` gives back what it is given."""

    def __init__(self, total: int) -> None:
        self._bar: Any = None
        if total:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn

            self._bar = Progress(BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            self._task = self._bar.add_task("programs", total=total)

    def __enter__(self) -> Callable[[Any], Any]:
        if self._bar is not None:
            self._bar.start()
        return self._tick

    def _tick(self, value: Any) -> Any:
        if self._bar is not None:
            self._bar.advance(self._task)
        return value

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()


def cache_prompt(prompt: Any, backend: Any = None) -> str:
    """Compute what many calls are going to begin with: a text, or the beginning of a program. Gives the text."""
    if isinstance(prompt, Function):
        return prompt.cache(backend)
    found: Backend = as_backend(backend)
    found.cache_prefix(prompt)
    return prompt
