"""KV pools and cache managers of tests that care for neither groups nor layouts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from phloem.core.memory import Group, groups_of
from phloem.kvcache.manager import CacheManager
from phloem.kvcache.pool import KVPool
from phloem.layers.context import memory_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from phloem.core.memory import MemorySpec
    from phloem.layers.context import AttentionSpec

WHOLE = Group("pages", 0, (0,))  # keeps every token


def pool_of(specs: Sequence[AttentionSpec], pages: int, *rest: Any) -> KVPool:
    """A pool with so many pages in each group, so that one page table serves all of them."""
    return pool_for(memory_of(specs), pages, *rest)


def pool_for(memory: Sequence[MemorySpec], pages: int, *rest: Any) -> KVPool:
    """The same of what a model keeps."""
    return KVPool(memory, [pages] * len(groups_of(memory)), *rest)


def cache_of(pages: int, page_size: int) -> CacheManager:
    """Of one group that keeps every token."""
    return CacheManager([WHOLE], [pages], page_size)
