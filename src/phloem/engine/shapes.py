"""The classes of steps: shapes that, among them, launch every kernel in every form that a step of any shape launches.

Which form of a kernel is launched follows from the numbers of tokens and rows, by tile sizes that are powers of two
and by splits that fall as rows rise. So: every number up to `EACH`, and beyond it those at and just above the sizes
that have graphs of their own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from phloem.attention import sharing_of
from phloem.engine.recorded.graphs import bucket_sizes
from phloem.engine.recorded.pieces import token_buckets
from phloem.engine.rehearsal import Rehearsed
from phloem.engine.sampler import sample
from phloem.engine.sizing import dummy_settings, run_step

if TYPE_CHECKING:
    from phloem.engine.sizing import Need
    from phloem.kvcache.pool import KVPool

EACH = 64
Shape = tuple[int, int]  # tokens, rows


def step_shapes(running: int, chunk: int, context: int) -> list[Shape]:
    """From small to large: decode steps (as many tokens as rows), one prompt, and several rows with prompts."""
    rows = sorted({*range(1, min(EACH, running) + 1), *bucket_sizes(running), running})
    prompts = sorted(
        {*range(2, min(EACH, chunk) + 1), *(size + one for size in token_buckets(chunk) for one in (0, 1)), chunk}
    )
    single = [(tokens, 1) for tokens in prompts if 1 < tokens <= min(chunk, context)]
    mixed = [(chunk, count) for count in (2, 3, min(running, chunk // 2)) if 1 < count < chunk]
    return [(count, count) for count in rows if count <= chunk] + single + mixed


def run_shape(need: Need, pool: KVPool, shape: Shape) -> None:
    """A step of this shape on dummy inputs, and each way of choosing tokens from it."""
    tokens, rows = shape
    lengths = [tokens // rows + (row < tokens % rows) for row in range(rows)]
    hidden_RN, logits_RV = run_step(need, pool, lengths)
    if rows > 1 and not isinstance(need.model, Rehearsed) and sharing_of(need.backend)[0] is not None:
        run_step(need, pool, lengths, shared=True)
    chosen_R = need.model.greedy(hidden_RN)
    if not need.leads:
        return
    ops, vocab = need.ops, need.model.vocab_size
    ops.argmax(logits_RV)
    ops.logsumexp(logits_RV)
    if ops.sample is not None:
        sample(logits_RV, dummy_settings(rows, vocab), ops)
    if ops.late_tokens_ is not None and ops.keep_tokens_ is not None:
        last = torch.zeros(1, dtype=torch.int64, device=logits_RV.device)
        ids_T, slots_T = (torch.zeros(tokens, dtype=torch.int64, device=last.device) for _ in range(2))
        ops.late_tokens_(ids_T, last, slots_T)
        for chosen in (chosen_R, ids_T[:rows]):  # the types of arg-max and of sampling
            for sound in (hidden_RN.sum(-1), logits_RV[:, 0].contiguous()):
                ops.keep_tokens_(last, slots_T[:rows], chosen, sound)
    which = torch.zeros(rows, dtype=torch.int32, device=logits_RV.device)
    mask = torch.full((rows, -(-vocab // 32)), -1, dtype=torch.int32, device=logits_RV.device)
    ops.mask_tokens_(logits_RV, which, mask)
