"""What is not here is refused by name, and so is a second `sglang` beside this one."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any, NoReturn

log = logging.getLogger("sglang")
PAGE = "docs/phloem-sglang.md lists what is there"


class NotThere(NotImplementedError):
    """SGLang has it, and Phloem has not."""


def refuse(name: str, why: str) -> NoReturn:
    raise NotThere(f"phloem-sglang has no {name}: {why} ({PAGE})")


def missing(module: str) -> Callable[[str], Any]:
    """A module's `__getattr__`: says that the name is not here. The log has it too, as `from ... import` drops it."""

    def look(name: str) -> Any:
        if not name.startswith("__"):
            log.warning("phloem-sglang has no %s.%s: %s", module, name, PAGE)
        raise AttributeError(f"phloem-sglang has no {module}.{name}: {PAGE}")

    return look


class _Refusing(MetaPathFinder):
    """Stands behind all other finders: whatever of sglang comes this far is not here."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: Any = None) -> None:
        if fullname.startswith("sglang."):
            raise ModuleNotFoundError(f"phloem-sglang has no module {fullname}: {PAGE}", name=fullname)


def stand_alone(home: Path) -> None:
    """Raises ImportError where another sglang is installed, or lies on the path."""
    try:
        real = distribution("sglang")
    except PackageNotFoundError:
        real = None
    places = [str(real.locate_file("sglang"))] if real is not None else []
    for entry in sys.path:
        other = Path(entry or ".") / "sglang" / "__init__.py"
        if other.is_file() and other.resolve().parent != home:
            places.append(str(other.parent))
    if places:
        raise ImportError(
            f"phloem-sglang ({home}) and another sglang ({places[0]}) are both here: one would hide the other. "
            "Uninstall one of them: `pip uninstall phloem-sglang` or `pip uninstall sglang`"
        )
    if not any(isinstance(finder, _Refusing) for finder in sys.meta_path):
        sys.meta_path.append(_Refusing())
