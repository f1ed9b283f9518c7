"""Where programs run. A file here is a kind of backend; `default` holds the one that is used when none is named."""

from __future__ import annotations

from typing import Any

from phloem.core.errors import BadRequest
from phloem.lang.backends._base import Backend
from phloem.utils.registry import Registry

BACKENDS: Registry[type[Backend]] = Registry("phloem.lang.backends", "backend", "BACKEND")


class _Default:
    """The process's default backend."""

    def __init__(self) -> None:
        self.backend: Backend | None = None


default = _Default()


def as_backend(value: Any = None) -> Backend:
    """A backend from a backend, an engine, a server's address, or None for the default.

    Raises:
        BadRequest: there is no default, or the value is nothing that programs can run on.
    """
    if value is None:
        if default.backend is None:
            raise BadRequest("there is no backend: call set_default_backend, or pass backend=")
        return default.backend
    if isinstance(value, Backend):
        return value
    if isinstance(value, str):
        return BACKENDS.module("http").RuntimeEndpoint(value)
    if hasattr(value, "generate") and hasattr(value, "async_generate"):
        kept = getattr(value, "_lang_backend", None)
        if kept is None:
            kept = BACKENDS.module("engine").EngineBackend(value)
            value._lang_backend = kept  # its chat format is worked out once
        return kept
    raise BadRequest(f"a {type(value).__name__} is no backend")
