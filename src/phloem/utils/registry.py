"""A folder is a registry and a file name is a key: `attention/cpu.py` is the attention backend `cpu`.

A file whose name begins with an underscore is not a choice, nor is a folder. Nothing is imported before it is asked
for.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from dataclasses import dataclass
from typing import TYPE_CHECKING

from phloem.core.errors import ConfigError

if TYPE_CHECKING:
    from types import ModuleType


@dataclass(frozen=True)
class Registry:
    """The modules of one package, by file name. `what` names one of them in messages ("attention backend")."""

    package: str
    what: str

    def names(self) -> list[str]:
        """Every choice, sorted; read from the folder, so a new file is found by itself."""
        path = importlib.import_module(self.package).__path__
        found = (item for item in pkgutil.iter_modules(path) if not item.ispkg)
        return sorted(item.name for item in found if not item.name.startswith("_"))

    def check(self, name: str) -> None:
        """Whether there is a module of that name.

        Raises:
            ConfigError: if there is none; the message lists the right names and the nearest spelling.
        """
        names = self.names()
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise ConfigError(f"unknown {self.what} {name!r}{hint}; known: {', '.join(names)}")

    def module(self, name: str) -> ModuleType:
        """Import the module of that name. Raises ConfigError as `check`."""
        self.check(name)
        return importlib.import_module(f"{self.package}.{name}")
