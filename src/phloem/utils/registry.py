"""A folder is a registry and a file name is a key: `attention/cpu.py` is the attention backend `cpu`.

A file whose name begins with an underscore is not a choice, nor is a folder. Nothing is imported before it is asked
for.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

from phloem.core.errors import ConfigError

if TYPE_CHECKING:
    from types import ModuleType

T = TypeVar("T")


@cache
def _names(package: str) -> tuple[str, ...]:
    path = importlib.import_module(package).__path__
    found = (item for item in pkgutil.iter_modules(path) if not item.ispkg)
    return tuple(sorted(item.name for item in found if not item.name.startswith("_")))


@dataclass(frozen=True)
class Registry(Generic[T]):
    """The plug-ins of one package, by file name: each file has `symbol`, a T.

    `what` names one of them in messages ("attention backend"). T is what the house knows of a plug-in: a protocol, or
    `type[Base]` where files share a base class.
    """

    package: str
    what: str
    symbol: str = ""

    def names(self) -> list[str]:
        """Every choice, sorted; read from the folder, so a new file is found by itself."""
        return list(_names(self.package))

    def get(self, name: str) -> T:
        """The plug-in of that name.

        Raises:
            ConfigError: as `module`; or if the file has no `symbol`, which is its author's mistake.
        """
        found: Any = vars(self.module(name)).get(self.symbol)
        if found is None:
            place = f"{self.package}.{name}".replace(".", "/")
            raise ConfigError(f"{place}.py has no {self.symbol!r}, which every {self.what} has")
        return cast("T", found)

    def module(self, name: str) -> ModuleType:
        """Import the module of that name.

        Raises:
            ConfigError: if there is none; the message lists the right names and the nearest spelling.
        """
        names = _names(self.package)
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise ConfigError(f"unknown {self.what} {name!r}{hint}; known: {', '.join(names)}")
        return importlib.import_module(f"{self.package}.{name}")

    def accept(self, plugin: T) -> T:
        """The plug-in itself: where this is called, a type checker compares it with T (`scripts/plugin_types.py`)."""
        return plugin
