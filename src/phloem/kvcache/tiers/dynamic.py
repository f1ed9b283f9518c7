"""A store by somebody else's class, of the interface that SGLang gives its dynamic backends: `exists`, `get` and `set`
by key, and `batch_exists` where the class has it.

Settings: `module_path` (a module's name, or a file of this machine), `class_name`, and whatever the class is made of:
it gets all of them as a dictionary. They come from the command line, never from a request.
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from phloem.core.errors import ConfigError
from phloem.utils import log

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from phloem.kvcache.tiers import Place, Row

_log = log.get("tiers")

PARAM = "hicache_storage_backend_extra_config"
SETTINGS = None


class Tier:
    """Rows are given as uint8 tensors over their memory. What the class raises counts as a page that is not there."""

    name, instant = "dynamic", False

    def __init__(self, place: Place) -> None:
        self._store = _made(dict(place.extra))
        self.failed, self.written = 0, 0
        self._told = False

    def exists(self, keys: Sequence[bytes]) -> int:
        return self._asked(self._exists, _names(keys))

    def _exists(self, names: list[str]) -> int:
        if _has(self._store, "batch_exists"):
            return int(self._store.batch_exists(names))
        return next((at for at, name in enumerate(names) if not self._store.exists(name)), len(names))

    def read(self, keys: Sequence[bytes], rows: Sequence[Row]) -> int:
        tensors = [torch.from_numpy(row) for row in rows]
        return self._asked(lambda names: self._read(names, tensors), _names(keys))

    def _read(self, names: list[str], tensors: list[torch.Tensor]) -> int:
        done = 0
        for name, tensor in zip(names, tensors, strict=False):
            found = self._store.get(name, tensor)
            if found is None or found is False:
                break
            if isinstance(found, torch.Tensor) and found.data_ptr() != tensor.data_ptr():
                tensor.copy_(found.view(torch.uint8).reshape(-1))
            done += 1
        return done

    def write(self, keys: Sequence[bytes], rows: Sequence[Row]) -> int:
        tensors = [torch.from_numpy(row) for row in rows]
        done = self._asked(lambda names: self._write(names, tensors), _names(keys))
        self.written += done
        return done

    def _write(self, names: list[str], tensors: list[torch.Tensor]) -> int:
        pairs = zip(names, tensors, strict=True)
        return next((at for at, pair in enumerate(pairs) if self._store.set(*pair) is False), len(names))

    def _asked(self, call: Callable[[list[str]], int], names: list[str]) -> int:
        try:
            return max(0, min(call(names), len(names)))
        except Exception:
            self.failed += 1
            if not self._told:
                self._told = True
                _log.exception("the store %s failed: what it should have given is computed", type(self._store).__name__)
            return 0

    def drop(self, keys: Sequence[bytes]) -> None:
        if _has(self._store, "delete"):
            self._asked(lambda names: sum(self._store.delete(name) is not False for name in names), _names(keys))

    def clear(self) -> None:
        if _has(self._store, "clear"):
            self._asked(lambda _: int(self._store.clear() is None), [])
        self.written = 0

    def stats(self) -> dict[str, float]:
        return {"pages": self.written, "failed": self.failed}

    def close(self) -> None:
        if _has(self._store, "close"):
            self._asked(lambda _: int(self._store.close() is None), [])


def _names(keys: Sequence[bytes]) -> list[str]:
    return [key.hex() for key in keys]


def _has(store: Any, name: str) -> bool:
    return any(callable(vars(kind).get(name)) for kind in type(store).__mro__)


def _made(extra: dict[str, Any]) -> Any:
    """Raises ConfigError."""
    module_path, class_name = extra.get("module_path"), extra.get("class_name")
    if not (isinstance(module_path, str) and isinstance(class_name, str)):
        raise ConfigError(f"{PARAM}: a dynamic store needs module_path and class_name", param=PARAM)
    try:
        module = _module(module_path)
        kind = vars(module)[class_name]
        store = kind(extra)
    except KeyError:
        raise ConfigError(f"{PARAM}: {module_path} has no {class_name}", param=PARAM) from None
    except Exception as error:
        text = f"{PARAM}: {class_name} of {module_path}: {type(error).__name__}: {error}"
        raise ConfigError(text, param=PARAM) from error
    if lacks := [name for name in ("exists", "get", "set") if not _has(store, name)]:
        raise ConfigError(f"{PARAM}: {class_name} has no {', '.join(lacks)}", param=PARAM)
    return store


def _module(place: str) -> Any:
    if not place.endswith(".py"):
        return importlib.import_module(place)
    path = Path(place)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise FileNotFoundError(place)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
