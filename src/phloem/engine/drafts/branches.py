"""Drafts that branch: where the tokens of a step's trees stand in memory, and what of it stays.

Each token of a tree is a row of one token, as the drafts of a chain are (`apart`), at the position that follows from
its depth. A branch, the way from the root to a leaf, lies in pages of its own: the first one in those of its request,
each other one in spare pages that begin with what the request's page has before the tree. So a token's page table shows
it the text, the tokens before it in its branch, and nothing else: whatever attends by pages attends to trees, and a
token gets the bits that it gets in a chain. Tokens that several branches share are computed once; their keys and values
are written into each of them (`Echoing`). When it is known which branch is right, its pages take the request's places.

Legend: T packed tokens of the step, D tokens written once more, R rows, P pages of a row, G groups of memory.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from phloem.layers.context import Heads

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from phloem.core.batch import Batch
    from phloem.engine.wanted import Up
    from phloem.kernels.ops import IndexCall, LatentCall
    from phloem.kvcache.pool import KVPool
    from phloem.layers.context import AttentionSpec, StateStep, StepMemory

ROOT = -1  # the parent of drafts that follow the last known token


@dataclass(frozen=True)
class TreeShape:
    """What is asked of trees. `width`: drafts that may follow the same token, and tokens of one depth behind which
    further ones are looked for; `depth`: drafts behind one another; `nodes`: drafts of a row; `most`: tokens of a step
    with trees."""

    width: int
    depth: int
    nodes: int
    most: int

    def pages_each(self, page_size: int) -> int:
        """Pages of a branch beside its request's, which may begin anywhere in the first."""
        return -(-(page_size + self.depth) // page_size)

    def spare_pages(self, page_size: int) -> int:
        """Of each group of pages: for the branches of a step, and twice as many while they grow."""
        return 2 * self.most * self.pages_each(page_size)


@dataclass(slots=True)
class Split:
    """A tree as branches. Tokens are numbered as they stand in the step: the root is 0."""

    depths: list[int]  # of each token
    homes: list[int]  # the first branch that each token is in
    paths: list[list[int]]  # of each branch, from the root on


def split(parents: Sequence[int]) -> Split:
    """`parents`: of each draft the one before it, or ROOT; all of them stand before it. The first branch is that of
    first children."""
    children: list[list[int]] = [[] for _ in range(len(parents) + 1)]
    depths = [0]
    for place, parent in enumerate(parents):
        children[parent + 1].append(place + 1)
        depths.append(depths[parent + 1] + 1)
    paths, left = list[list[int]](), [[0]]
    while left:
        path = left.pop()
        below = children[path[-1]]
        if not below:
            paths.append(path)
        left += [[*path, child] for child in reversed(below)]
    homes = [-1] * len(depths)
    for branch in range(len(paths) - 1, -1, -1):
        for place in paths[branch]:
            homes[place] = branch
    return Split(depths, homes, paths)


@dataclass(slots=True)
class Copies:
    """Pages of one group that are to be copied."""

    to: list[int] = field(default_factory=list)
    of: list[int] = field(default_factory=list)

    def run(self, tensors: Sequence[Tensor], up: Up) -> None:
        """In each of the tensors [pages, ...]; no page is both read and written."""
        if not self.to:
            return
        to, of = up([np.array(self.to, np.int64), np.array(self.of, np.int64)])
        for tensor in tensors:
            tensor.index_copy_(0, to, tensor.index_select(0, of))


@dataclass(slots=True)
class Echoes:
    """The rows of a step, and behind them those that are written once more."""

    batch: Batch  # of T + D tokens
    source: NDArray[np.int64]  # [T + D] which of the T tokens


@dataclass(slots=True)
class Tree:
    """One row's tree, laid out."""

    split: Split
    start: int  # the root's position in its text
    pages: list[list[list[int]]]  # [branches][G] ids; of the first branch none


@dataclass(slots=True)
class Laid:
    """A step with trees: rows of one token each, whose tables show them their branch."""

    batch: Batch
    echoes: Echoes
    trees: dict[int, Tree]  # by row of the step as it was given


class Branches:
    """The spare pages of one pool, and what is laid into them. Used by the runner's thread alone.

    `own`: of each group how many pages the cache manager gives out; those behind them are spare.
    """

    def __init__(self, pool: KVPool, own: Sequence[int], shape: TreeShape, up: Up) -> None:
        self._pool, self._own, self._up = pool, tuple(own), up
        self.each = shape.pages_each(pool.page_size)

    def pages(self, branch: int) -> list[list[int]]:
        """[G] the spare pages of a step's branch."""
        first = branch * self.each
        return [list(range(own + first, own + first + self.each)) for own in self._own]

    def table(self, table_P: NDArray[np.int32], start: int, pages: Sequence[int]) -> NDArray[np.int32]:
        """A row's table with a branch's pages from position `start` on."""
        found, first = table_P.copy(), start // self._pool.page_size
        count = min(len(pages), len(found) - first)
        found[first : first + count] = pages[:count]
        return found

    def lay(self, batch: Batch, apart: Callable[[Batch], Batch]) -> Laid:
        """Lay a step's trees out, and bring what the requests' pages have before them to their branches.

        `apart`: cuts the step's rows as far as each draft is a row.
        """
        ends = np.cumsum(batch.query_lens)
        rows = apart(batch)
        row_of = np.repeat(np.arange(rows.num_rows), rows.query_lens)
        prefix, tables = rows.prefix_lens.copy(), [table.copy() for table in rows.tables]
        copies = [Copies() for _ in tables]
        trees, echoes, used = dict[int, Tree](), _Written(len(tables)), 0
        for row in np.flatnonzero(batch.outputs > 1).tolist():
            root = int(ends[row] - batch.outputs[row])
            start = int(batch.prefix_lens[row] + batch.query_lens[row] - batch.outputs[row])
            assert batch.parents is not None
            found = split((batch.parents[root + 1 : ends[row]] - root - 1).tolist())
            pages = [[], *(self.pages(used + branch) for branch in range(len(found.paths) - 1))]
            used += len(found.paths) - 1
            tree = trees[row] = Tree(found, start, pages)
            for place, (depth, home) in enumerate(zip(found.depths, found.homes, strict=True)):
                if place:
                    prefix[row_of[root + place]] = start + depth
                if home:
                    for table, whole, ids in zip(tables, batch.tables, pages[home], strict=True):
                        table[row_of[root + place]] = self.table(whole[row], start, ids)
            self._echo(batch, row, root, tree, echoes)
            self._begun(batch, row, tree, copies)
        for group, one in enumerate(copies):
            one.run(self._pool.stored(group), self._up)
        laid = replace(rows, prefix_lens=prefix, tables=tuple(tables), parents=None)
        return Laid(laid, echoes.behind(laid), trees)

    def keep(self, batch: Batch, laid: Laid, kept: dict[int, int]) -> None:
        """`kept`: of each row with a tree the last token that counts, numbered as in `Split`. The pages of its branch
        become the request's."""
        copies, size = [Copies() for _ in batch.tables], self._pool.page_size
        for row, place in kept.items():
            tree = laid.trees[row]
            home = tree.split.homes[place]
            if not home:
                continue
            first, last = tree.start // size, (tree.start + tree.split.depths[place]) // size
            for one, table, ids in zip(copies, batch.tables, tree.pages[home], strict=True):
                one.to += table[row, first : last + 1].tolist()
                one.of += ids[: last + 1 - first]
        for group, one in enumerate(copies):
            one.run(self._pool.stored(group), self._up)

    def _begun(self, batch: Batch, row: int, tree: Tree, copies: Sequence[Copies]) -> None:
        page, offset = divmod(tree.start, self._pool.page_size)
        for branch in tree.pages[1:] if offset else ():
            for one, table, ids in zip(copies, batch.tables, branch, strict=True):
                one.to.append(ids[0])
                one.of.append(int(table[row, page]))

    def _echo(self, batch: Batch, row: int, root: int, tree: Tree, echoes: _Written) -> None:
        """What a branch has beside its own drafts: those before them, and what is known of the page that it begins in
        by this step alone."""
        page = tree.start - tree.start % self._pool.page_size
        known = range(max(int(batch.prefix_lens[row]), page) - tree.start, 0)  # by their distance to the root
        slot = int(batch.slots[row])
        for branch, path in enumerate(tree.split.paths[1:], 1):
            tables = zip(batch.tables, tree.pages[branch], strict=True)
            shown = [self.table(table[row], tree.start, ids) for table, ids in tables]
            shared = [place for place in path if tree.split.homes[place] != branch]
            for place, depth in (*zip(known, known, strict=True), *((one, tree.split.depths[one]) for one in shared)):
                echoes.add(root + place, tree.start + depth, slot, shown)


class _Written:
    """Tokens that are written once more, as they are found."""

    def __init__(self, groups: int) -> None:
        self.source, self.positions, self.slots = list[int](), list[int](), list[int]()
        self.tables: list[list[NDArray[np.int32]]] = [[] for _ in range(groups)]

    def add(self, source: int, position: int, slot: int, tables: Sequence[NDArray[np.int32]]) -> None:
        self.source.append(source)
        self.positions.append(position)
        self.slots.append(slot)
        for found, table in zip(self.tables, tables, strict=True):
            found.append(table)

    def behind(self, rows: Batch) -> Echoes:
        """As rows of one token, behind those of the step."""
        count, kind = len(self.source), np.int32
        whole = replace(
            rows,
            slots=np.concatenate([rows.slots, np.array(self.slots, kind)]),
            query_lens=np.concatenate([rows.query_lens, np.ones(count, kind)]),
            prefix_lens=np.concatenate([rows.prefix_lens, np.array(self.positions, kind)]),
            input_ids=np.concatenate([rows.input_ids, np.zeros(count, kind)]),
            tables=tuple(
                np.concatenate([table, *(one[None] for one in more)])
                for table, more in zip(rows.tables, self.tables, strict=True)
            ),
            outputs=np.concatenate([rows.outputs, np.zeros(count, kind)]),
            prompt_targets={},
        )
        return Echoes(whole, np.concatenate([np.arange(rows.num_tokens), np.array(self.source, np.int64)]))


class Echoing:
    """A step's memory (`layers.context.StepMemory`) for layers that compute T tokens, of which D are written twice.

    `source` int64 [T + D]: the tokens of the inner memory's rows.
    """

    def __init__(self, inner: StepMemory, source: Tensor, count: int) -> None:
        self._inner, self._source, self._count = inner, source, count

    def attend(self, spec: AttentionSpec, heads: Heads) -> Tensor:
        source, rotation = self._source, heads.rotation
        if rotation is not None:
            rotation = replace(rotation, positions=rotation.positions[..., source])
        new = (heads.k[source], heads.v[source]) if spec.writes else (heads.k, heads.v)
        more = Heads(heads.q[source], *new, heads.sinks, rotation, heads.distances)
        return self._inner.attend(spec, more)[: self._count]

    def attend_latent(
        self,
        pool: int,
        q_nope: Tensor,
        q_rope: Tensor,
        latent: Tensor,
        call: LatentCall,
        chosen: Tensor | None = None,
    ) -> Tensor:
        more = q_nope[self._source], q_rope[self._source], latent[self._source]
        return self._inner.attend_latent(pool, *more, call, chosen)[: self._count]

    def choose(self, pool: int, call: IndexCall) -> Tensor | None:
        """All T + D of them: `attend_latent` alone reads it."""
        source = self._source
        more = replace(call, q=call.q[source], keys=call.keys[source], weights=call.weights[source])
        return self._inner.choose(pool, more)

    def keep(self, pool: int, x_TN: Tensor, /) -> None:
        self._inner.keep(pool, x_TN[self._source])

    def kept(self, pool: int, /) -> tuple[Tensor, Tensor]:
        first, second = self._inner.kept(pool)
        return first[: self._count], second[: self._count]

    def state(self, pool: int) -> StateStep:
        raise AssertionError(f"pool {pool} keeps states: a state takes in tokens in one order, and trees have several")
