"""The classes of steps: shapes that, among them, launch every kernel in every form that a step of any shape launches.

Which form of a kernel is launched follows from the numbers of tokens and rows, by tile sizes that are powers of two
and by splits that fall as rows rise. So: every number up to `EACH`, and beyond it those at and just above the sizes
that have graphs of their own. How long the rows' texts are decides for few kernels, and of decode steps alone: some of
those are run at the end of the context too.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from phloem.attention import sharing_of
from phloem.engine.choices.sizing import dummy_settings, run_step
from phloem.engine.drafts.beside import part_of
from phloem.engine.ranks.rehearsal import Rehearsed
from phloem.engine.recorded.graphs import bucket_sizes
from phloem.engine.recorded.pieces import token_buckets
from phloem.engine.sampling.logprobs import logprob_tensors
from phloem.engine.sampling.sampler import sample

if TYPE_CHECKING:
    from torch import Tensor

    from phloem.engine.choices.sizing import Need
    from phloem.engine.drafts.drafting import Loaded
    from phloem.kvcache.pool import KVPool

EACH = 64
FAR = (1, 2, 3)  # rows of decode steps that are run at the end of the context
DENSE_TEXTS = 1024
VERIFIED = 257  # tokens of a step whose logits are wanted: of drafts, or of a prompt; more launch nothing else
READS = 512  # tokens that a model which drafts reads in one pass, at most
Shape = tuple[int, int, int]  # tokens, rows, tokens of each row before the step


def step_shapes(running: int, chunk: int, context: int) -> list[Shape]:
    """From small to large: decode steps (as many tokens as rows), one prompt, and several rows with prompts."""
    rows = sorted({*range(1, min(EACH, running) + 1), *bucket_sizes(running), running})
    prompts = sorted(
        {*range(2, min(EACH, chunk) + 1), *(size + one for size in token_buckets(chunk) for one in (0, 1)), chunk}
    )
    decode = [(count, count, 0) for count in rows if count <= chunk]
    far = [(count, count, context - 1) for count in sorted({*FAR, min(running, chunk)}) if count <= min(running, chunk)]
    single = [(tokens, 1, 0) for tokens in prompts if 1 < tokens <= min(chunk, context)]
    mixed = [(chunk, count, 0) for count in (2, 3, min(running, chunk // 2)) if 1 < count < chunk]
    return decode + (far if context > 1 else []) + single + mixed


def text_lengths(most: int) -> list[int]:
    """Tokens of steps that among them launch every kernel of a model that reads whole texts, of up to `most` tokens: up
    to `DENSE_TEXTS` as many as prompts have, and of longer ones those twice as long as others."""
    dense = [size + more for size in token_buckets(min(most, DENSE_TEXTS)) for more in (0, 1)]
    long = [(1 << power) + more for power in range(most.bit_length()) for more in (0, 1)]
    found = {*range(1, EACH + 1), *dense, *long, most}
    return sorted(length for length in found if length <= most)


def text_shapes(most: int, longest: int) -> list[Shape]:
    """The same as shapes, each of as few texts of up to `longest` tokens as can be, and two texts of one token."""
    return [(tokens, -(-tokens // longest), 0) for tokens in text_lengths(most)] + [(2, 2, 0)]


def lengths_of(shape: Shape) -> list[int]:
    """New tokens of each row."""
    tokens, rows, _ = shape
    return [tokens // rows + (row < tokens % rows) for row in range(rows)]


def run_shape(need: Need, pool: KVPool, shape: Shape) -> None:
    """A step of this shape on dummy inputs, with adapters too where there may be any, and each way of choosing tokens
    from it; then a pass of what drafts."""
    tokens, rows, prefix = shape
    lengths = lengths_of(shape)
    hidden_RN, logits_RV = run_step(need, pool, lengths, prefix=prefix)
    ranks = need.model if isinstance(need.model, Rehearsed) else None
    if ranks is None and rows > 1 and sharing_of(need.backend)[0] is not None:
        run_step(need, pool, lengths, shared=True, prefix=prefix)
    if need.adapts and (ranks is None or not ranks.together):  # ranks together run the same steps, and no others
        run_step(need, pool, lengths, prefix=prefix, adapted=True)
    chosen_R = need.model.greedy(hidden_RN)
    if ranks is None and rows == 1 and tokens <= VERIFIED:
        need.model.head(hidden_RN.repeat(tokens, 1))
    if not need.leads:
        return
    _choose(need, logits_RV)
    _begin_and_end(need, hidden_RN, logits_RV, chosen_R, tokens)
    if need.helper is not None and tokens <= max(READS, rows):
        _draft(need, need.helper, pool, lengths)


def _choose(need: Need, logits_RV: Tensor) -> None:
    """Every way of choosing, and what is told beside the tokens."""
    ops, vocab, rows = need.ops, need.model.vocab_size, len(logits_RV)
    ops.argmax(logits_RV)
    if ops.sample is not None:
        sample(logits_RV, dummy_settings(rows, vocab), ops)
    chosen_R = torch.zeros(rows, dtype=torch.int64, device=logits_RV.device)
    # Of all positions, which are views of the head's result, and of some, which are a copy.
    for some_RV in (logits_RV, logits_RV[chosen_R]):
        logprob_tensors(some_RV, chosen_R, min(2, vocab), None, ops)
    which = torch.zeros(rows, dtype=torch.int32, device=logits_RV.device)
    mask = torch.full((rows, -(-vocab // 32)), -1, dtype=torch.int32, device=logits_RV.device)
    ops.mask_tokens_(logits_RV, which, mask)


def _begin_and_end(need: Need, hidden_RN: Tensor, logits_RV: Tensor, greedy_R: Tensor, tokens: int) -> None:
    """What a step takes from the one before it, and leaves for the next."""
    ops, rows = need.ops, len(logits_RV)
    if ops.late_tokens_ is None or ops.keep_tokens_ is None:
        return
    last = torch.zeros(1, dtype=torch.int64, device=logits_RV.device)
    ids_T, slots_T = (torch.zeros(tokens, dtype=torch.int64, device=last.device) for _ in range(2))
    ops.late_tokens_(ids_T, last, slots_T)
    for chosen in (greedy_R, ids_T[:rows]):  # the types of arg-max and of sampling
        for sound in (hidden_RN.sum(-1), logits_RV[:, 0].contiguous()):
            ops.keep_tokens_(last, slots_T[:rows], chosen, sound)


def _draft(need: Need, helper: Loaded, pool: KVPool, lengths: list[int]) -> None:
    """A pass of the model that drafts, its choice, and what it carries to its next pass."""
    model: Any = helper.model
    part = part_of(pool, helper.first, len(model.memory))
    assert need.attends is not None, "what drafts has attention of its own"
    own = replace(need, model=model, backend=need.attends(model.attention_specs), adapts=False, helper=None)
    hidden_RN, logits_RV = run_step(own, part, lengths)
    model.greedy(hidden_RN)
    if need.ops.sample is not None:
        sample(logits_RV, dummy_settings(len(lengths), need.model.vocab_size), need.ops)
    if helper.carries:
        first, second = (half.unsqueeze(1) for half in hidden_RN.chunk(2, -1))
        slots = torch.zeros(len(hidden_RN), dtype=torch.int32, device=pool.device)
        need.ops.write_kv(first, second, part.keys[0], part.values[0], slots)
