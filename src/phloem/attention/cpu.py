"""Attention on CPU: the table's own kernel if it has one, else torch's fused attention over gathered pages.

Long prefills are cut into blocks of queries that each see only the keys up to their end, then rows and blocks of
similar size share one call. Legend: n rows of a group, Q queries per row, L keys per row, G = H / K, rest as in ops.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn import functional as F

from phloem.attention._store import store, unserved
from phloem.attention.reference import TableStep, fitting, fours
from phloem.kernels import reference_attention

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from phloem.attention import AttentionNeed
    from phloem.kernels.ops import Ops, PagedBatch
    from phloem.kvcache.pool import KVPool
    from phloem.layers.context import AttentionSpec, AttentionStep, Heads

QUERY_BLOCK = 256  # queries of one row in one call: half of a causal square is then never computed
GROUP_CELLS = 1 << 22  # queries x keys of one call: bounds the mask and the gathered pages
SLACK = 1.3  # how much padding a group may bring


class Backend:
    name = "cpu"
    page_size = 16

    def __init__(self, ops: Ops, specs: Sequence[AttentionSpec], device: torch.device, dtype: torch.dtype) -> None:
        self.ops = fitting(ops, dtype)
        self.native = self.ops.paged_attention is not reference_attention.paged_attention
        self.recordable = self.native  # gathered pages are planned on the host

    def decline(self, need: AttentionNeed) -> str | None:
        if need.device.type != "cpu":
            return f"runs on CPU tensors, not on {need.device.type}"
        if need.kv_dtype.itemsize == 1 and need.kv_dtype.is_floating_point:
            return f"keeps no KV cache of type {need.kv_dtype}"
        if not need.kv_dtype.is_floating_point and not self.native:
            return f"the op table {self.ops.name!r} keeps no KV cache of type {need.kv_dtype}"
        return unserved(need.specs, blocks=True) or fours(need, self.page_size)

    def begin(self, batch: PagedBatch, pool: KVPool) -> AttentionStep:
        return TableStep(self.ops, batch, pool) if self.native else GatheredStep(self.ops, batch, pool)


@dataclass(slots=True)
class Block:
    """Some consecutive queries of one row, and the pages they see. Positions count from the first of these pages."""

    first_token: int  # among the step's T
    queries: int
    ahead: int  # keys up to and with its last query's own
    keys: int  # the last query sees this many
    pages: np.ndarray[tuple[int], np.dtype[np.int32]]


@dataclass(slots=True)
class Group:
    """Blocks that share a call, padded to the same number of queries and keys."""

    pages_nP: Tensor
    tokens_nQ: Tensor  # the token of each query; padding repeats the row's first
    real: Tensor | None  # which of the n * Q are queries, or None: all
    unseen: tuple[Tensor, Tensor, Tensor] | None  # (row, page, offset) of gathered slots beyond the row's keys
    mask_nQL: Tensor  # 0 where a query sees a key, -inf elsewhere


@dataclass(slots=True)
class GatheredStep:
    """One step's attention by torch's fused attention. Plans are made once for each size of window and block."""

    ops: Ops
    batch: PagedBatch
    pool: KVPool
    plans: dict[tuple[int, int], list[Group]] = field(default_factory=dict)

    def __call__(self, spec: AttentionSpec, heads: Heads) -> Tensor:
        keys, values = self.pool.keys[spec.pool], self.pool.values[spec.pool]
        q_THD = store(self.ops, spec, heads, (keys, values), self.batch.token_slots)
        sizes = spec.window, spec.block
        groups = self.plans.get(sizes)
        if groups is None:
            groups = self.plans[sizes] = plan(self.batch, keys.shape[2], *sizes)
        out_THD = torch.zeros(q_THD.shape, dtype=q_THD.dtype)
        for group in groups:
            k_nKLD = gather(keys, group, q_THD.dtype)
            v_nKLD = gather(values, group, q_THD.dtype)
            _attend(group, spec, q_THD, k_nKLD, v_nKLD, heads.sinks, out_THD)
        return out_THD


def gather(cache: Tensor, group: Group, dtype: torch.dtype) -> Tensor:
    """A group's pages as [n, K, L, D], in one copy; slots that hold nobody's KV read as 0."""
    kv_heads, size, width = cache.shape[1:]
    index_nKP = group.pages_nP[:, None, :] * kv_heads + torch.arange(kv_heads)[:, None]
    pages_nKPSD = cache.view(-1, size, width)[index_nKP]
    if group.unseen is not None:
        # What an earlier owner left there may be NaN, which no mask takes away.
        row, page, offset = group.unseen
        pages_nKPSD[row, :, page, offset] = 0
    return pages_nKPSD.flatten(2, 3).to(dtype)


def _attend(
    group: Group,
    spec: AttentionSpec,
    q_THD: Tensor,
    k_nKLD: Tensor,
    v_nKLD: Tensor,
    sinks_H: Tensor | None,
    out_THD: Tensor,
) -> None:
    n, queries = group.tokens_nQ.shape
    share = spec.heads // spec.kv_heads
    # The query heads of one kv head stand beside each other as if they were more queries: no key is copied.
    q = q_THD[group.tokens_nQ].unflatten(2, (spec.kv_heads, share)).permute(0, 2, 3, 1, 4).flatten(2, 3)
    mask = group.mask_nQL[:, None].to(q.dtype)
    mask = mask if queries == 1 else mask.repeat(1, 1, share, 1)
    if spec.softcap or sinks_H is not None:
        out = _with_extras(spec, q, k_nKLD, v_nKLD, mask, sinks_H, queries)
    else:
        out = F.scaled_dot_product_attention(q, k_nKLD, v_nKLD, attn_mask=mask, scale=spec.scale)
    rows = out.unflatten(2, (share, queries)).permute(0, 3, 1, 2, 4).reshape(n * queries, spec.heads, -1)
    tokens = group.tokens_nQ.reshape(-1)
    if group.real is not None:
        rows, tokens = rows[group.real], tokens[group.real]
    out_THD[tokens] = rows


def _with_extras(
    spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, sinks_H: Tensor | None, queries: int
) -> Tensor:
    """Attention with a soft cap or sinks, which the fused one has not; float32 inside."""
    scores = q.float() @ k.float().transpose(-1, -2) * spec.scale
    if spec.softcap:
        scores = torch.tanh(scores / spec.softcap) * spec.softcap
    scores = scores + mask.float()
    if sinks_H is None:
        weights = scores.softmax(-1)
    else:
        column = sinks_H.float().view(spec.kv_heads, -1, 1, 1).expand(-1, -1, queries, 1).flatten(1, 2)
        weights = torch.cat((scores, column.expand(len(q), -1, -1, 1)), -1).softmax(-1)[..., :-1]
    return (weights @ v.float()).to(q.dtype)


def plan(batch: PagedBatch, page_size: int, window: int, size: int = 0) -> list[Group]:
    """Cut a step's rows into blocks and put blocks of similar size together. `size`: a query sees to the end of its own
    so many positions; 0: to itself."""
    starts = batch.query_start.numpy()
    lengths = batch.seq_lens.numpy()
    table = batch.page_table.numpy()
    blocks: list[Block] = []
    for row, length in enumerate(lengths.tolist()):
        begin, count = int(starts[row]), int(starts[row + 1] - starts[row])
        for offset in range(0, count, QUERY_BLOCK):
            queries = min(QUERY_BLOCK, count - offset)
            end = length - count + offset + queries
            first = max(0, end - queries - window + 1) // page_size if window else 0
            seen = min(length, -(-end // size) * size) if size else end
            pages = table[row, first : max(first + 1, -(-seen // page_size))]
            ahead, keys = end - first * page_size, seen - first * page_size
            blocks.append(Block(begin + offset, queries, ahead, keys, pages))
    return [_group(blocks, page_size, window, size) for blocks in batches_of(blocks)]


def batches_of(blocks: list[Block]) -> list[list[Block]]:
    """Blocks sorted by size and cut where a group would become too padded or too large."""
    groups: list[list[Block]] = []
    cells = 0
    for block in sorted(blocks, key=lambda block: (block.queries > 1, block.keys, block.queries)):
        own = block.queries * block.keys
        if groups:
            last = groups[-1]
            queries = max(block.queries, *(other.queries for other in (last[0], last[-1])))
            padded = (len(last) + 1) * queries * block.keys
            fits = (last[0].queries > 1) == (block.queries > 1) and padded <= GROUP_CELLS
            if fits and padded <= SLACK * (cells + own) + 4096:
                last.append(block)
                cells += own
                continue
        groups.append([block])
        cells = own
    return groups


def _group(blocks: list[Block], page_size: int, window: int, size: int) -> Group:
    n = len(blocks)
    queries_n = np.array([block.queries for block in blocks])
    keys_n = np.array([block.keys for block in blocks])
    queries, width = int(queries_n.max()), max(len(block.pages) for block in blocks)
    pages_nP = np.zeros((n, width), np.int64)
    for row, block in enumerate(blocks):
        pages_nP[row, : len(block.pages)] = block.pages
    step_Q = np.arange(queries)
    real_nQ = step_Q < queries_n[:, None]
    first_n = np.array([block.first_token for block in blocks])
    tokens_nQ = first_n[:, None] + np.where(real_nQ, step_Q, 0)
    key_L = np.arange(width * page_size)
    # Padding queries see what the first one sees, so that no row of the softmax is empty.
    ahead_n = np.array([block.ahead for block in blocks])
    position_nQ = (ahead_n - queries_n)[:, None] + np.where(real_nQ, step_Q, 0)
    behind_nQL = position_nQ[:, :, None] - key_L
    hidden_nQL = behind_nQL < 0
    if size:  # without a window, so that pages count from position 0
        last_nQ = np.minimum((position_nQ // size + 1) * size, keys_n[:, None]) - 1
        hidden_nQL = key_L > last_nQ[:, :, None]
    if window:
        hidden_nQL |= behind_nQL >= window
    mask_nQL = torch.zeros(hidden_nQL.shape).masked_fill_(torch.from_numpy(hidden_nQL), float("-inf"))
    row, slot = np.nonzero(key_L >= keys_n[:, None])
    unseen = (torch.from_numpy(row), torch.from_numpy(slot // page_size), torch.from_numpy(slot % page_size))
    return Group(
        pages_nP=torch.from_numpy(pages_nP),
        tokens_nQ=torch.from_numpy(tokens_nQ),
        real=None if real_nQ.all() else torch.from_numpy(real_nQ.reshape(-1)),
        unseen=unseen if len(row) else None,
        mask_nQL=mask_nQL,
    )
