"""Drafters: a file each, its name is the algorithm's. Each has `Drafter`, made once per engine."""

from __future__ import annotations

from phloem.speculation.drafters._base import Draft, Drafter
from phloem.utils.registry import Registry

DRAFTERS: Registry[type[Drafter]] = Registry("phloem.speculation.drafters", "speculative algorithm", "Drafter")

__all__ = ["DRAFTERS", "Draft", "Drafter"]
