"""Drafts that branch, layer by layer: what a token of a tree attends to, where it stands, and which way is kept."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from native_support import built
from pools import pool_for
from tree_support import (
    CPU,
    OWN,
    PARENTS,
    SHAPE,
    SPECS,
    TEXTS,
    D,
    H,
    K,
    S,
    check_attention,
    slots_of,
    tables,
    tree_batch,
)

from phloem.attention import BACKENDS, begin
from phloem.core.batch import Batch
from phloem.core.memory import Kept
from phloem.engine.apart import drafts_apart
from phloem.engine.drafts.branches import ROOT, Branches, Echoing, TreeShape, split
from phloem.engine.drafts.growing import SHARED, Growth, with_draw, with_trees
from phloem.engine.inputs import Step
from phloem.engine.transfer import LastTokens, plain_up
from phloem.engine.wanted import NONE, Branching, Wanted
from phloem.kernels import native
from phloem.kernels.calls import AttentionCall, PagedBatch
from phloem.kernels.ops import Ops
from phloem.kernels.reference_attention import paged_attention
from phloem.layers.context import Heads, memory_of


def test_a_tree_is_split_into_ways_to_its_leaves() -> None:
    found = split(PARENTS[0])
    assert found.paths == [[0, 1, 2, 5], [0, 1, 4], [0, 3, 6]]
    assert found.depths == [0, 1, 2, 1, 2, 3, 2] and found.homes == [0, 0, 0, 2, 1, 0, 2]
    assert split([]).paths == [[0]] and split([ROOT, 0, 1]).homes == [0, 0, 0, 0]


def test_spare_pages_hold_a_branch_wherever_it_begins() -> None:
    for size, depth in itertools.product((1, 4, 16), (1, 3, 5, 31)):
        each = TreeShape(2, depth, depth, 24).pages_each(size)
        assert each == max((offset + depth) // size + 1 for offset in range(size))


CASES = {
    "reference": (False, torch.float32, 2e-5),
    "cpu": (False, torch.float32, 2e-5),
    "cpu, native": (True, torch.bfloat16, 3e-2),
    "cpu, native, int8": (True, torch.int8, 6e-2),
}


@pytest.mark.parametrize("case", list(CASES))
def test_a_draft_attends_to_its_own_way_alone_and_the_right_way_is_kept(case: str) -> None:
    by_kernels, dtype, close = CASES[case]
    if by_kernels and not built():
        pytest.skip("the native library is not built (no C++ compiler?)")
    ops = native.table(threads=1) if by_kernels else Ops()
    pool = pool_for(memory_of(SPECS), OWN + SHAPE.spare_pages(S), S, dtype, CPU)
    check_attention(BACKENDS.module(case.split(",")[0]).Backend(ops, SPECS, CPU, dtype), pool, close)


def test_rows_are_those_of_a_tree_mask() -> None:
    """The reference's own attention under a tree mask, in which all drafts of a row stand behind its tokens."""
    torch.manual_seed(5)
    memory = memory_of(SPECS[:1])
    pool = pool_for(memory, OWN + SHAPE.spare_pages(S), S, torch.float32, CPU)
    masked = pool_for(memory, 9, S, torch.float32, CPU)
    ops, batch = Ops(), tree_batch(pool)
    k, v = torch.randn(2, 2, 32, K, D)
    for row, known in enumerate((TEXTS[0] - 1, TEXTS[1] - 2)):
        slots = slots_of(tables(pool)[0][row], known).int()
        for one in (pool, masked):
            ops.write_kv(k[row, :known], v[row, :known], one.keys[0], one.values[0], slots)
    laid = Branches(pool, [OWN], SHAPE, plain_up(CPU)).lay(batch, drafts_apart)
    inputs = Step(laid.batch, Wanted.of(batch), pool, LastTokens(2, CPU, True, None), echoes=laid.echoes).inputs
    assert inputs.echo is not None and batch.parents is not None
    backend = BACKENDS.module("reference").Backend(ops, SPECS[:1], CPU, torch.float32)
    q, new_k, new_v = torch.randn(12, H, D), *torch.randn(2, 12, K, D)
    echoing = Echoing(begin(backend, inputs.echo[0], pool), inputs.echo[1], 12)
    got = echoing.attend(SPECS[0], Heads(q.clone(), new_k.clone(), new_v.clone()))
    mask = torch.zeros(12, 7, dtype=torch.bool)
    starts = [0, 7, 12]
    for row in range(2):
        for token in range(starts[row], starts[row + 1]):
            way = token
            while way >= 0:
                mask[token, way - starts[row]] = True
                way = int(batch.parents[way])
    ends = (batch.prefix_lens + batch.query_lens).tolist()
    slots = torch.cat([slots_of(tables(pool)[0][row], ends[row])[-n:] for row, n in enumerate((7, 5))]).int()
    ops.write_kv(new_k, new_v, masked.keys[0], masked.values[0], slots)
    whole = PagedBatch(
        torch.tensor(starts, dtype=torch.int32), torch.tensor(ends, dtype=torch.int32),
        torch.from_numpy(tables(pool)[0]), slots, 7, max(ends),
    )  # fmt: skip
    want = paged_attention(q, (masked.keys[0], masked.values[0]), whole, AttentionCall(0.25), tree_mask=mask)
    torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)


def test_what_heads_read_is_kept_in_every_branch() -> None:
    spec = Kept(6, "float32")
    pool = pool_for([spec], OWN + SHAPE.spare_pages(S), S, torch.float32, CPU)
    batch = tree_batch(pool)
    branches = Branches(pool, [OWN], SHAPE, plain_up(CPU))
    laid = branches.lay(batch, drafts_apart)
    inputs = Step(laid.batch, Wanted.of(batch), pool, LastTokens(2, CPU, True, None), echoes=laid.echoes).inputs
    assert inputs.echo is not None
    backend = BACKENDS.module("reference").Backend(Ops(), [], CPU, torch.float32)
    memory = Echoing(begin(backend, inputs.echo[0], pool), inputs.echo[1], 12)
    x = torch.randn(12, 6)
    memory.keep(0, x)
    torch.testing.assert_close(torch.cat(memory.kept(0), -1), x)
    branches.keep(batch, laid, {0: 4})  # the way 0, 1, 4
    slots = slots_of(tables(pool)[0][0], 15)[12:]
    found = torch.cat([pool.keys[0].view(-1, 3)[slots], pool.values[0].view(-1, 3)[slots]], -1)
    torch.testing.assert_close(found, x[[0, 1, 4]])


def test_the_token_that_was_chosen_picks_the_draft_to_go_on_with() -> None:
    pool = pool_for(memory_of(SPECS[:1]), 9, S, torch.float32, CPU)
    batch = tree_batch(pool)
    wanted = Wanted.of(batch)
    assert isinstance(wanted, Branching)
    # Positions: the root of the first row and its six drafts 1 to 6, that of the second (behind a known token), 101 on.
    assert wanted.at.tolist() == [0, 1, 2, 3, 4, 5, 6, 8, 9, 10, 11] and wanted.drafted == 9
    assert wanted.known.tolist() == [13, 14, 15, 14, 15, 16, 15, 24, 25, 25, 25]
    assert wanted.before(0, 5) == [1, 2, 5] and wanted.before(0, 0) == [] and wanted.before(7, 9) == [102]
    assert wanted.runs(0, 7) == [[0, 1, 4], [0, 1, 2, 5], [0, 3, 6]]
    tokens = np.array([3, 9, 9, 6, 9, 9, 77, 102, 1, 55, 1])
    assert [way.tolist() for way in wanted.kept(tokens)] == [[0, 3, 6], [7, 9]]
    assert wanted.last(tokens).tolist() == [6, 9]
    last, counts = wanted.last_on_device(torch.from_numpy(tokens), plain_up(CPU))
    assert last.tolist() == [6, 9] and counts.nonzero().flatten().tolist() == [0, 3, 6, 7, 9]
    wanted.fail(0, 3, ValueError("no token can be chosen there"))
    assert wanted.drafts is not None and wanted.drafts[3] == NONE and not wanted.errors
    assert [way.tolist() for way in wanted.kept(tokens)] == [[0], [7, 9]]
    wanted.fail(0, 0, ValueError("nor here"))
    assert list(wanted.errors) == [0]


def test_chains_are_left_to_what_runs_chains() -> None:
    pool = pool_for(memory_of(SPECS[:1]), 9, S, torch.float32, CPU)
    batch = Batch(
        0, np.array([0], np.int32), np.array([1], np.int32), np.array([4], np.int32), np.array([9], np.int32),
        tables(pool), np.array([1], np.int32),
    )  # fmt: skip
    assert with_trees(batch, {0: ([1, 2, 3], [ROOT, 0, 1])}).parents is None
    assert with_trees(batch, {}) is batch


@pytest.mark.parametrize(("width", "depth", "count"), [(2, 3, 5), (3, 4, 12), (4, 2, 20), (3, 5, 2)])
def test_a_tree_grows_as_eagle_2_says(width: int, depth: int, count: int) -> None:
    """Against the procedure written over whole sequences: each depth keeps the likeliest few of those that follow the
    ones kept before, and of all of them the likeliest make the tree."""
    rng = np.random.default_rng(width * 100 + count)
    likely: dict[tuple[int, ...], np.ndarray[Any, Any]] = {}

    def after(way: tuple[int, ...]) -> np.ndarray[Any, Any]:
        if way not in likely:
            likely[way] = np.log(rng.dirichlet(np.full(6, 0.4)))
        return likely[way]

    few, deep = min(width, count), min(depth, count)
    growth, tips = Growth(0, count, TreeShape(width, depth, count, 24)), [(ROOT, ())]
    while tips:
        for node, way in tips:
            order = np.argsort(-after(way))[:width]
            growth.add(node, order.tolist(), after(way)[order].tolist())
        ways = {ROOT: (), **{node: way for node, way in tips}}
        new = {node: (*ways[growth.parents[node]], growth.tokens[node]) for node in growth.fresh}
        tips = [(node, new[node]) for node in growth.go_on()]
    seen: dict[tuple[int, ...], float] = {}
    kept: list[tuple[int, ...]] = [()]
    for _ in range(deep):
        found = {
            (*way, int(token)): seen.get(way, 0.0) + float(after(way)[token])
            for way in kept
            for token in np.argsort(-after(way))[:few]
        }
        seen |= found
        kept = sorted(found, key=lambda way: -found[way])[:few]
    want = sorted(seen, key=lambda way: -seen[way])[:count]
    tokens, parents = growth.chosen()
    got: list[tuple[int, ...]] = []
    for token, parent in zip(tokens, parents, strict=True):
        assert parent < len(got)
        got.append((*(got[parent] if parent != ROOT else ()), token))
    assert set(got) == set(want) and len(got) == min(count, len(seen))


def test_what_the_model_draws_counts_as_likely_as_such_drafts_are_right() -> None:
    scores = np.log(np.array([0.5, 0.3, 0.1]))
    tokens, found = with_draw(np.array([7, 8, 9]), scores, 8)
    assert tokens == [8, 7, 9] and found[0] == pytest.approx(np.log(SHARED))
    assert np.exp(found[1]) == pytest.approx(0.5 * (1 - SHARED) / 0.7)
    tokens, found = with_draw(np.array([7, 8, 9]), scores, 4)  # one that is not among the likeliest
    assert tokens == [4, 7, 8, 9] and np.exp(found[1:]).sum() == pytest.approx(0.9 * (1 - SHARED))
    tokens, found = with_draw(np.array([7, 8]), np.array([np.log(0.9), -np.inf]), 7)
    assert tokens == [7] and found == [pytest.approx(np.log(0.9))]
