"""The prefix tree against plain dictionaries and hand-made cases."""

from __future__ import annotations

import numpy as np
import pytest

from phloem.kvcache.node import Node
from phloem.kvcache.radix import RadixCache
from phloem.kvcache.report import view_of

S = 2  # tokens a page


def data(*tokens: int) -> bytes:
    return np.array(tokens, dtype=np.int32).tobytes()


def pages(*ids: int) -> np.ndarray:
    return np.array(ids, dtype=np.int32)


def put(tree: RadixCache, tokens: tuple[int, ...], ids: tuple[int, ...], namespace: str = "") -> list[int]:
    """Insert and unlock; gives the pages that the tree has for it."""
    count = len(tokens) // S
    node, found = tree.take(namespace, data(*tokens), count)
    have = len(found)
    node, kept, _ = tree.extend(node, data(*tokens[have * S :]), pages(*ids[have:]))
    tree.unlock(node)
    return [*found.tolist(), *kept.tolist()]


def found(tree: RadixCache, *tokens: int, namespace: str = "", limit: int = 100) -> int:
    return tree.find(namespace, data(*tokens), min(limit, len(tokens) // S)).num_pages


def test_matches_whole_pages_only() -> None:
    tree = RadixCache(S)
    put(tree, (1, 2, 3, 4), (1, 2))
    assert found(tree, 1, 2, 3, 4, 5, 6) == 2
    assert found(tree, 1, 2, 3, 9) == 1
    assert found(tree, 1, 9) == 0
    assert found(tree, 1, 2, 3, 4, limit=1) == 1


def test_splits_at_page_borders_and_keeps_pages() -> None:
    tree = RadixCache(S)
    put(tree, (1, 2, 3, 4, 5, 6), (1, 2, 3))
    assert put(tree, (1, 2, 3, 4, 7, 8), (9, 9, 4)) == [1, 2, 4]
    assert tree.num_nodes == 3 and tree.pages == 4
    node, got = tree.take("", data(1, 2, 3, 4, 5, 6), 3)
    assert got.tolist() == [1, 2, 3]
    tree.unlock(node)


def test_a_held_node_survives_its_split() -> None:
    tree = RadixCache(S)
    put(tree, (1, 2, 3, 4, 5, 6), (1, 2, 3))
    held, _ = tree.take("", data(1, 2, 3, 4, 5, 6), 3)
    other, got = tree.take("", data(1, 2, 9, 9), 2)
    assert got.tolist() == [1]
    assert tree.evictable_pages == 0
    tree.unlock(other)
    assert tree.evictable_pages == 0
    grown, _, _ = tree.extend(held, data(7, 8), pages(4))
    assert found(tree, 1, 2, 3, 4, 5, 6, 7, 8) == 4
    tree.unlock(grown)
    assert tree.evictable_pages == 4


def test_namespaces_share_nothing_and_vanish_when_empty() -> None:
    tree = RadixCache(S)
    put(tree, (1, 2), (1,), namespace="a")
    assert found(tree, 1, 2, namespace="b") == 0
    node, _ = tree.take("b", data(1, 2), 1)
    tree.unlock(node)
    assert list(tree._roots) == ["a"]
    assert tree.evict(5).tolist() == [1]
    assert not tree._roots


def test_extend_reports_what_the_tree_had_already() -> None:
    tree = RadixCache(S)
    one, _ = tree.take("", b"", 0)
    two, _ = tree.take("", b"", 0)
    one, kept, _ = tree.extend(one, data(1, 2, 3, 4), pages(1, 2))
    assert kept.tolist() == [1, 2]
    two, kept, _ = tree.extend(two, data(1, 2, 3, 4, 5, 6), pages(3, 4, 5))
    assert kept.tolist() == [1, 2, 5]
    tree.unlock(one)
    assert tree.evictable_pages == 0
    tree.unlock(two)
    assert tree.evictable_pages == tree.pages == 3


def three_leaves(policy: str) -> RadixCache:
    tree = RadixCache(S, policy)
    put(tree, (1, 1), (1,))
    put(tree, (2, 2), (2,))
    put(tree, (3, 3), (3,))
    for _ in range(3):
        put(tree, (2, 2), (9,))
    put(tree, (1, 1), (9,))
    return tree


@pytest.mark.parametrize(("policy", "order"), [("lru", [3, 2, 1]), ("lfu", [3, 1, 2]), ("fifo", [1, 2, 3])])
def test_eviction_order(policy: str, order: list[int]) -> None:
    tree = three_leaves(policy)
    assert [int(tree.evict(1)[0]) for _ in range(3)] == order
    assert tree.evict(1).tolist() == [] and tree.pages == 0


def test_unknown_eviction_names_the_known() -> None:
    with pytest.raises(ValueError, match="fifo, lfu, lru"):
        RadixCache(S, "random")


def test_eviction_trims_from_the_end_and_never_takes_locked_pages() -> None:
    tree = RadixCache(S)
    put(tree, (1, 2, 3, 4, 5, 6), (1, 2, 3))
    held, _ = tree.take("", data(1, 2), 1)
    assert tree.evict(1).tolist() == [3]
    assert found(tree, 1, 2, 3, 4, 5, 6) == 2
    assert tree.evict(5).tolist() == [2]
    assert found(tree, 1, 2, 3, 4) == 1
    tree.unlock(held)
    assert tree.evict(5).tolist() == [1]


def test_parents_go_after_their_children() -> None:
    tree = RadixCache(S)
    put(tree, (1, 2, 3, 4), (1, 2))
    put(tree, (1, 2, 5, 6), (9, 3))
    order = [int(tree.evict(1)[0]) for _ in range(3)]
    assert order == [2, 3, 1]


def test_forget_drops_a_branch_up_to_where_others_need_it() -> None:
    tree = RadixCache(S)
    put(tree, (1, 2, 3, 4), (1, 2))
    put(tree, (1, 2, 5, 6), (9, 3))
    node, _ = tree.take("", data(1, 2, 3, 4), 2)
    tree.unlock(node)
    assert tree.forget(node).tolist() == [2]
    assert found(tree, 1, 2, 5, 6) == 2


def test_unlocking_too_often_is_noticed() -> None:
    tree = RadixCache(S)
    put(tree, (1, 2), (1,))
    node, _ = tree.take("", data(1, 2), 1)
    tree.unlock(node)
    with pytest.raises(AssertionError, match="more often"):
        tree.unlock(node)


def test_against_a_dictionary_of_prefixes() -> None:
    rng = np.random.default_rng(4)
    tree = RadixCache(S)
    known: set[bytes] = set()
    following = 1
    for _ in range(400):
        tokens = rng.integers(0, 3, int(rng.integers(1, 8)) * S).tolist()
        want = 0
        while want * S < len(tokens) and data(*tokens[: (want + 1) * S]) in known:
            want += 1
        assert found(tree, *tokens) == want
        count = len(tokens) // S
        put(tree, tuple(tokens), tuple(range(following, following + count)))
        following += count
        known |= {data(*tokens[: end * S]) for end in range(1, count + 1)}
        assert tree.pages == len(known) == tree.evictable_pages
    freed = tree.evict(10**6)
    assert len(set(freed.tolist())) == len(known) and tree.pages == 0 == tree.num_nodes


def test_snapshot_is_bounded_and_speaks_of_parents() -> None:
    tree = RadixCache(S)
    put(tree, (1, 2, 3, 4), (1, 2), namespace="x")
    put(tree, (1, 2, 5, 6), (9, 3), namespace="x")
    nodes = view_of(tree)
    assert [(node["tokens"], node["children"], node["start"]) for node in nodes] == [(2, 2, 0), (2, 0, 2), (2, 0, 2)]
    assert nodes[0]["parent"] == 0 and nodes[1]["parent"] == nodes[0]["id"]
    assert nodes[1]["first_ids"] == [3, 4] and nodes[0]["namespace"] == "x" and nodes[0]["hits"] == 1
    assert len(view_of(tree, max_nodes=2)) == 2


def test_the_eviction_heap_stays_as_small_as_the_tree() -> None:
    tree = RadixCache(S)
    for _ in range(50):
        for first in range(20):
            put(tree, (first, 0, first, 1), (first * 2 + 1, first * 2 + 2))
    assert tree.num_nodes == 20 and len(tree._heap) <= 20
    assert all(isinstance(entry[2], Node) for entry in tree._heap)
