"""What a program will append, found by running it without a model: to look at, and to find common prefixes."""

from __future__ import annotations

import os.path
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from phloem.core.errors import BadRequest, PhloemError
from phloem.lang.backends._base import Backend
from phloem.lang.interpreter import Executor, PrefixEnd, Settings
from phloem.lang.ir import (
    Expr,
    Gen,
    RoleBegin,
    RoleEnd,
    Sampling,
    Select,
    Text,
    Variable,
    names_in,
    parts_of,
)
from phloem.lang.state import ProgramState
from phloem.lang.turns import Turns


@dataclass
class Fork:
    """In a trace: the place where copies began, with what each of them appends."""

    branches: list[TraceState]


@dataclass
class Join:
    """In a trace: the copies of a fork came together."""

    mode: str
    count: int


class TraceState(Turns):
    """Stands for a program's state; keeps what is appended. Variables read as placeholders."""

    def __init__(self, parent: TraceState | None = None) -> None:
        self.nodes: list[Expr | Fork | Join] = []
        self.variables: dict[str, Variable] = dict(parent.variables) if parent is not None else {}

    def __iadd__(self, other: Any) -> TraceState:
        for part in parts_of(other):
            self.nodes.append(part)
            for name in names_in([part]):
                self.variables[name] = Variable(name, part)
        return self

    def __getitem__(self, name: str) -> Variable:
        if name not in self.variables:
            raise KeyError(f"the program has no variable {name!r}; it has: {', '.join(self.variables) or 'none'}")
        return self.variables[name]

    def __setitem__(self, name: str, value: Any) -> None:
        self.variables[name] = value if isinstance(value, Variable) else Variable(name, Text(str(value)))

    def __contains__(self, name: object) -> bool:
        return name in self.variables

    get_var = __getitem__
    set_var = __setitem__

    def _append(self, node: Any) -> None:
        self.__iadd__(node)

    def fork(self, size: int = 1, position_ids_offset: list[int] | None = None) -> TraceGroup:
        branches = [TraceState(self) for _ in range(size)]
        self.nodes.append(Fork(branches))
        return TraceGroup(branches, self)

    @contextmanager
    def copy(self, position_ids_offset: list[int] | None = None) -> Generator[TraceState]:
        yield self.fork(1)[0]

    def sync(self) -> None:
        """Nothing runs in a trace."""

    # looking at it

    def lines(self, depth: int = 0) -> Iterator[str]:
        """One line for each node, branches indented."""
        pad = "  " * depth
        for node in self.nodes:
            if isinstance(node, Fork):
                yield f"{pad}fork {len(node.branches)}"
                for branch in node.branches:
                    yield from branch.lines(depth + 1)
            elif isinstance(node, Join):
                yield f"{pad}join {node.count} ({node.mode})"
            else:
                yield pad + describe(node)

    def print_graph_dfs(self) -> None:
        """Print the nodes, depth first."""
        print("\n".join(self.lines()))

    def prefix(self) -> str:
        """The plain text in front of the first node that is not text."""
        text = ""
        for node in self.nodes:
            if not isinstance(node, Text):
                break
            text += node.value
        return text


@dataclass
class TraceGroup:
    """Forked traces."""

    states: list[TraceState]
    source: TraceState = field(repr=False)

    def join(self, mode: str = "gather_variable") -> None:
        for state in self.states:
            self.source.variables.update(state.variables)
        self.source.nodes.append(Join(mode, len(self.states)))

    def __getitem__(self, index: int) -> TraceState:
        return self.states[index]

    def __setitem__(self, index: int, value: TraceState) -> None:
        if self.states[index] is not value:
            raise BadRequest("a group's states cannot be replaced")

    def __len__(self) -> int:
        return len(self.states)

    def __iter__(self) -> Iterator[TraceState]:
        return iter(self.states)

    def __iadd__(self, other: Any) -> TraceGroup:
        for index, state in enumerate(self.states):
            if callable(other) and not isinstance(other, Expr):
                state += other(index)
            elif isinstance(other, list | tuple):
                state += other[index]
            else:
                state += other
        return self


class Unknown(Variable):
    """An argument that is not known yet; a program that writes it out has come to the end of its prefix."""

    def __str__(self) -> str:
        raise PrefixEnd

    def __format__(self, spec: str) -> str:
        raise PrefixEnd


def describe(node: Expr) -> str:
    if isinstance(node, Text):
        return f"text {node.value!r}"
    if isinstance(node, Gen):
        return f"gen {node.name!r} {node.sampling.given()}"
    if isinstance(node, Select):
        return f"select {node.name!r} {node.choices!r}"
    if isinstance(node, RoleBegin | RoleEnd):
        return f"{'begin' if isinstance(node, RoleBegin) else 'end'} {node.role}"
    if isinstance(node, Variable):
        return f"variable {node.name!r}"
    return repr(node)


def common_prefix(function: Callable[..., Any], backend: Backend, calls: Sequence[dict[str, Any]]) -> str:
    """The text that all these calls of a program begin with, in front of any call of the model.

    The program runs up to its first call of the model, for the first and the last of the calls only: a wrong guess
    costs one computation and never changes a result.
    """
    if len(calls) < 2:
        return ""
    texts = [leading_text(function, backend, call) for call in (calls[0], calls[-1])]
    return os.path.commonprefix(texts)  # noqa: RUF071 - characters are what is meant


def leading_text(function: Callable[..., Any], backend: Backend, arguments: dict[str, Any]) -> str:
    """All text up to a program's first call of the model, or to where it fails or needs an unknown value."""
    executor = Executor(Settings(backend, Sampling(), threads=False, prefix_only=True))
    try:
        function(ProgramState(executor), **arguments)
    except PrefixEnd:
        pass
    except (PhloemError, ArithmeticError, LookupError, TypeError, ValueError, AttributeError, OSError):
        pass  # the run itself will tell
    return executor.content.text if executor.error is None else ""
