"""Processes that find this know a platform more: `card` (`card.py` beside it). Python imports it when it starts."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path


class _Finder:
    """Gives the folder of platforms a second place."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name != "phloem.platforms":
            return None
        spec = PathFinder.find_spec(name, path)  # pyright: ignore[reportArgumentType]
        if spec is not None and spec.submodule_search_locations is not None:
            spec.submodule_search_locations.append(str(Path(__file__).parent / "platform"))
        return spec


sys.meta_path.insert(0, _Finder)
