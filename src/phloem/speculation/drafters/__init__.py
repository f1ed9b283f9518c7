"""Drafters: a file each, its name is the algorithm's. Each has `Drafter`, made once per engine: of those that look at
texts it is one, of those that are models (`core.speculation.MODELS`) it loads one."""

from __future__ import annotations

from phloem.speculation.drafters._base import Draft, Drafter, Loader
from phloem.utils.registry import Registry

DRAFTERS: Registry[type[Drafter]] = Registry("phloem.speculation.drafters", "speculative algorithm", "Drafter")
LOADERS: Registry[type[Loader]] = Registry("phloem.speculation.drafters", "speculative algorithm", "Drafter")

__all__ = ["DRAFTERS", "LOADERS", "Draft", "Drafter", "Loader"]
