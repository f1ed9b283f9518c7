"""Drafters: a file each, its name is the algorithm's. Those that look at texts have `Drafter`, made once per engine;
those that are models (`core.speculation.MODELS`) have `Loader`."""

from __future__ import annotations

from phloem.speculation.drafters._base import Draft, Drafter, Loader
from phloem.utils.registry import Registry

DRAFTERS: Registry[type[Drafter]] = Registry("phloem.speculation.drafters", "speculative algorithm", "Drafter")
LOADERS: Registry[type[Loader]] = Registry("phloem.speculation.drafters", "speculative algorithm", "Loader")

__all__ = ["DRAFTERS", "LOADERS", "Draft", "Drafter", "Loader"]
