"""The prefix tree for people: a bounded view of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from phloem.kvcache.node import Node
    from phloem.kvcache.radix import RadixCache


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
