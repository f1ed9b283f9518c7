"""Two texts with trees of drafts behind them, in a pool of two layers; and what their tokens attend to, densely."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from phloem.attention import begin
from phloem.core.batch import Batch
from phloem.engine.apart import drafts_apart
from phloem.engine.drafts.branches import ROOT, Branches, Echoing, TreeShape
from phloem.engine.drafts.growing import with_trees
from phloem.engine.inputs import Step
from phloem.engine.transfer import LastTokens, plain_up
from phloem.engine.wanted import Wanted
from phloem.layers.context import AttentionSpec, Heads

if TYPE_CHECKING:
    from phloem.attention import AttentionBackend
    from phloem.kernels.ops import Ops
    from phloem.kvcache.pool import KVPool

CPU = torch.device("cpu")
H, K, D, S = 4, 2, 16, 8
SPECS = [AttentionSpec(0, H, K, D, 0.25), AttentionSpec(1, H, K, D, 0.25, window=11)]
# Two requests of 13 and 24 known tokens, and the drafts of each: a bush, and one that branches at once.
TEXTS, PARENTS = [13, 24], [[ROOT, 0, ROOT, 0, 1, 2], [ROOT, ROOT, ROOT]]
SHAPE = TreeShape(3, 3, 6, 24)
OWN = 9  # pages of each group that the texts may have


def tables(pool: KVPool) -> tuple[np.ndarray[Any, Any], ...]:
    """Four pages of each row in each group, in an order of their own."""
    return tuple(np.array([[5, 2, 7, 1], [3, 8, 4, 6]], np.int32) for _ in pool.groups)


def tree_batch(pool: KVPool) -> Batch:
    """The last known token of each text with its drafts behind it; the second has another known one before it."""
    batch = Batch(
        step=0,
        slots=np.array([0, 1], np.int32),
        query_lens=np.array([1, 2], np.int32),
        prefix_lens=np.array([TEXTS[0] - 1, TEXTS[1] - 2], np.int32),
        input_ids=np.array([50, 51, 52], np.int32),
        tables=tables(pool),
        outputs=np.array([1, 1], np.int32),
    )
    trees = {row: (list(range(100 * row + 1, 100 * row + 1 + len(p))), p) for row, p in enumerate(PARENTS)}
    return with_trees(batch, trees)


def slots_of(table: np.ndarray[Any, Any], count: int) -> torch.Tensor:
    places = np.arange(count)
    return torch.from_numpy(table[places // S] * S + places % S)


def filled(pool: KVPool, ops: Ops) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values [2 texts, 32, K, D] of each layer's texts; what is known before the step is in the pool."""
    found = []
    for layer in range(len(SPECS)):
        k, v = torch.randn(2, 32, K, D), torch.randn(2, 32, K, D)
        for row, known in enumerate((TEXTS[0] - 1, TEXTS[1] - 2)):
            slots = slots_of(tables(pool)[0][row], known).int()
            ops.write_kv(k[row, :known], v[row, :known], pool.keys[layer], pool.values[layer], slots)
        found.append((k, v))
    return found


def check_attention(backend: AttentionBackend, pool: KVPool, close: float) -> None:
    """Against one dense attention over each text with its drafts behind it, under a mask of who is before whom."""
    torch.manual_seed(3)
    known = filled(pool, backend.ops)
    branches = Branches(pool, [OWN] * len(pool.groups), SHAPE, plain_up(CPU))
    batch = tree_batch(pool)
    laid = branches.lay(batch, drafts_apart)
    last = LastTokens(2, CPU, True, None)
    step = Step(laid.batch, Wanted.of(batch), pool, last, echoes=laid.echoes)
    assert not step.flat and not step.recordable
    inputs = step.inputs
    assert inputs.echo is not None
    rows, source = inputs.echo
    memory = Echoing(begin(backend, rows, pool), source, batch.num_tokens)
    new = {}
    for layer, spec in enumerate(SPECS):
        q, k, v = torch.randn(batch.num_tokens, H, D), *torch.randn(2, batch.num_tokens, K, D)
        new[layer] = k, v
        got = memory.attend(spec, Heads(q.clone(), k.clone(), v.clone()))
        torch.testing.assert_close(got, dense(spec, q, k, v, known[layer]), atol=close, rtol=close)
    # Of the first row a way that lies in spare pages is right, of the second only the known token counts.
    branches.keep(batch, laid, {0: 6, 1: 0})
    for layer in range(len(SPECS)):
        k_cache, v_cache = pool.keys[layer], pool.values[layer]
        if k_cache.dtype != torch.float32:
            continue
        for slot, token in zip(slots_of(tables(pool)[0][0], 15)[12:].tolist(), (0, 3, 6), strict=True):
            torch.testing.assert_close(k_cache[slot // S, :, slot % S], new[layer][0][token])
            torch.testing.assert_close(v_cache[slot // S, :, slot % S], new[layer][1][token])
        before = slots_of(tables(pool)[0][0], 12)
        torch.testing.assert_close(k_cache[before // S, :, before % S], known[layer][0][0, :12])


def dense(
    spec: AttentionSpec, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, known: tuple[torch.Tensor, torch.Tensor]
) -> torch.Tensor:
    out, at = [], 0
    for row, parents in enumerate(PARENTS):
        start, count = (TEXTS[0] - 1, 7) if row == 0 else (TEXTS[1] - 2, 5)
        first = count - len(parents) - 1  # known tokens of the step before the root
        before = [-1, *range(first), *(parent + first + 1 for parent in parents)][:count]
        for token in range(count):
            way = [token]
            while (parent := before[way[-1]]) >= 0:
                way.append(parent)
            keys, values = (
                torch.cat([known[part][row, :start], new[[at + one for one in way[::-1]]]])
                for part, new in enumerate((k, v))
            )
            if spec.window:
                keys, values = keys[-spec.window :], values[-spec.window :]
            keys, values = (one.repeat_interleave(H // K, 1) for one in (keys, values))
            weights = (torch.einsum("hd,lhd->hl", q[at + token], keys) * spec.scale).softmax(-1)
            out.append(torch.einsum("hl,lhd->hd", weights, values))
        at += count
    return torch.stack(out)
