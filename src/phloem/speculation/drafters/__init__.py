"""Drafters: a file each, its name is the algorithm's. Each has `Drafter`, made once per engine: of those that look at
texts it is one, of those that are models (`core.speculation.MODELS`) it loads one."""

from __future__ import annotations

from phloem.speculation.drafters._base import Draft, Drafter, Loader
from phloem.utils.registry import Registry

DRAFTERS: Registry[type[Drafter] | type[Loader]] = Registry(
    "phloem.speculation.drafters", "speculative algorithm", "Drafter"
)

__all__ = ["DRAFTERS", "Draft", "Drafter", "Loader", "loader", "of_texts"]


def of_texts(name: str) -> type[Drafter]:
    """The drafter of this name, which looks at texts."""
    found = DRAFTERS.get(name)
    assert issubclass(found, Drafter), f"{name} is a model"
    return found


def loader(name: str) -> type[Loader]:
    """What loads the model of this name."""
    found = DRAFTERS.get(name)
    assert issubclass(found, Loader), f"{name} is no model"
    return found
