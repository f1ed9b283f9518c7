"""Groups and prefix tree for people: accounts, and a bounded view of the nodes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from phloem.kvcache.manager import CacheManager
    from phloem.kvcache.node import Node
    from phloem.kvcache.radix import RadixCache


def snapshot(cache: CacheManager, max_nodes: int = 512) -> dict[str, Any]:
    """The tree for a live view: totals in tokens of the first group; at most `max_nodes` nodes, parents first."""
    size = cache.page_size
    return {
        "enabled": cache.enabled,
        "page_size": size,
        "total_tokens": cache.total_pages * size,
        "free_tokens": cache.free_pages * size,
        "held_tokens": cache.held_pages * size,
        "cached_tokens": cache.cached(0) * size,
        "evictable_tokens": cache.evictable(0) * size,
        "evicted_tokens": cache.evicted_pages * size,
        "num_nodes": sum(part.tree.num_nodes for part in cache.parts),
        "nodes": [
            {**row, "part": part.number} if len(cache.parts) > 1 else row
            for part in cache.parts
            for row in view_of(part.tree, max_nodes // len(cache.parts))
        ],
        "groups": group_accounts(cache),
    }


def group_accounts(cache: CacheManager) -> list[dict[str, Any]]:
    """Each group's pages, or slots of state: where they are."""
    return [
        {
            "kind": group.kind,
            "window": group.window,
            "layers": len(group.layers),
            "total": sum(part.allocators[number].usable for part in cache.parts),
            "free": sum(part.allocators[number].available for part in cache.parts),
            "held": sum(part.own[number] for part in cache.parts),
            "cached": cache.cached(number),
            "evictable": cache.evictable(number),
            "evicted": sum(part.evicted[number] for part in cache.parts),
        }
        for number, group in enumerate(cache.groups)
    ]


def view_of(tree: RadixCache, max_nodes: int = 512, preview: int = 16) -> list[dict[str, Any]]:
    """The first `max_nodes` nodes, parents first: sizes in tokens, with the first `preview` token ids of each.

    `window_tokens`: of each group with a window, how many of the node's tokens it still has.
    """
    found: list[dict[str, Any]] = []
    for name, depth, node in tree.everything():
        if len(found) == max_nodes:
            break
        found.append(_row(tree.page_size, name, depth, node, preview))
    return found


def _row(size: int, name: str, depth: int, node: Node, preview: int) -> dict[str, Any]:
    parent = node.parent.uid if node.parent is not None and node.parent.parent is not None else 0
    return {
        "id": node.uid,
        "parent": parent,
        "namespace": name,
        "start": depth * size,
        "tokens": node.count * size,
        "first_ids": np.frombuffer(node.data, np.int32, min(preview, len(node.data) // 4)).tolist(),
        "hits": node.hits,
        "locks": node.lock,
        "children": len(node.children),
        "last_used": node.stamp,
        "window_tokens": [int((pages != 0).sum()) * size for pages in node.windows],
        "state": node.state != 0,
    }
