"""What a running state and a traced one have in common: turns and scopes are written by appending marks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from phloem.lang.ir import RoleBegin, RoleEnd, ScopeBegin, ScopeEnd


class Turns(ABC):
    """Base of the states that programs work on."""

    @abstractmethod
    def _append(self, node: Any) -> None:
        """Add a mark, an expression or a text."""

    @contextmanager
    def _turn(self, role: str) -> Generator[None]:
        self._append(RoleBegin(role))
        yield
        self._append(RoleEnd(role))

    def _role(self, role: str, content: Any) -> Any:
        if content is None:
            return self._turn(role)
        for node in (RoleBegin(role), content, RoleEnd(role)):
            self._append(node)
        return None

    def system(self, content: Any = None) -> Any:
        """`with s.system(): ...`, or `s.system("...")`."""
        return self._role("system", content)

    def user(self, content: Any = None) -> Any:
        """As `system`."""
        return self._role("user", content)

    def assistant(self, content: Any = None) -> Any:
        """As `system`."""
        return self._role("assistant", content)

    @contextmanager
    def var_scope(self, name: str) -> Generator[None]:
        """All text that is appended inside is kept under a name."""
        self._append(ScopeBegin(name))
        yield
        self._append(ScopeEnd(name))
