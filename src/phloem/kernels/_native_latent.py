"""Latent attention of the native table, over a bfloat16 cache; the method is in csrc/cpu/each/latent.cpp.

Prompts are computed by the reference, row by row, whose products of matrices are faster there; but in the invariant
table, where a token's bits may not depend on how many others its row has in the step.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from phloem.kernels import reference_attention
from phloem.kernels._native_basic import heads_of, rows_of
from phloem.kernels.calls import LATENT_SHORT

if TYPE_CHECKING:
    from torch import Tensor

    from phloem.kernels._native_runtime import Runtime
    from phloem.kernels.calls import LatentCall, PagedBatch

MAX_SPLITS = 16
ALL = 1 << 40
BEYOND = 1 << 30  # stands behind the last position that was chosen
REGION = 1_000_000  # "work" that always shares the op out: how much there is, only seq_lens tells


def ops(rt: Runtime, *, exact: bool) -> dict[str, Any]:
    """The table's entries; `exact`: of the invariant table. None where the library lacks the kernels."""
    if not rt.has("latent_attention"):
        return {}
    both = _attention(rt, exact)
    return {"write_latent": _writer(rt), "latent_attention": both, "chosen_latent_attention": both}


def _writer(rt: Runtime) -> Any:
    WRITE = rt.op("write_latent")

    def write_latent(latent_TC: Tensor, cache: Tensor, slots_T: Tensor) -> None:
        if not _kept_here(cache) or slots_T.dtype != torch.int32:
            reference_attention.write_latent(latent_TC, cache, slots_T)
            return
        x_TC = rows_of(latent_TC)
        tokens, width = x_TC.shape
        if width != cache.shape[3] or slots_T.shape != (tokens,):
            raise ValueError(f"latents {list(x_TC.shape)} and slots {list(slots_T.shape)} for {list(cache.shape)}")
        rt.call(
            WRITE, tokens * width // 4, x=x_TC.data_ptr(), cache=cache.data_ptr(), slots=slots_T.data_ptr(),
            tokens=tokens, width=width, page_size=cache.shape[2], x_stride=x_TC.stride(0), page_stride=cache.stride(0),
        )  # fmt: skip

    return write_latent


def _attention(rt: Runtime, exact: bool) -> Any:
    ATTEND = rt.op("latent_attention")
    SPLIT, HAND = rt.constant("latent.kLatentSplit"), rt.constant("latent.kLatentTokens")

    def native(
        q: tuple[Tensor, Tensor], cache: Tensor, batch: PagedBatch, how: LatentCall, chosen: Tensor | None, most: int
    ) -> Tensor:
        (tokens, heads, nope), (_, _, rope) = q[0].shape, q[1].shape
        rank, value, (rows, pages), page_size = (
            how.w_uk.shape[2],
            how.w_uv.shape[2],
            batch.page_table.shape,
            cache.shape[2],
        )
        half = how.w_uk.dtype == torch.bfloat16
        splits = max(1, min(MAX_SPLITS, -(-pages * page_size // SPLIT)))
        hand = min(tokens, HAND)
        out = rt.empty((tokens, heads, value))
        queries, partial = rt.empty((hand, heads, rank + rope)), rt.empty((hand, heads, splits, rank + 2))
        (nope_token, nope_head), (rope_token, rope_head) = heads_of(q[0]), heads_of(q[1])
        rt.call(
            ATTEND, REGION, q_nope=q[0].data_ptr(), q_rope=q[1].data_ptr(), up=None if half else how.w_uk.data_ptr(),
            up_bf16=how.w_uk.data_ptr() if half else None,
            cache=cache.data_ptr(), out=out.data_ptr(), query_start=batch.query_start.data_ptr(),
            seq_lens=batch.seq_lens.data_ptr(), page_table=batch.page_table.data_ptr(),
            chosen=None if chosen is None else chosen.data_ptr(), queries=queries.data_ptr(),
            partial=partial.data_ptr(), tokens=tokens, rows=rows, heads=heads, rank=rank, rope=rope, nope=nope,
            value=value, page_size=page_size, page_stride=cache.stride(0), pages_per_row=batch.page_table.stride(0),
            nope_token=nope_token, nope_head=nope_head, rope_token=rope_token, rope_head=rope_head, splits=splits,
            count=0 if chosen is None else chosen.shape[1], most=most, scale=how.scale,
        )  # fmt: skip
        return out

    def latent_attention(
        q_nope: Tensor,
        q_rope: Tensor,
        cache: Tensor,
        batch: PagedBatch,
        call: LatentCall,
        chosen_Tk: Tensor | None = None,
    ) -> Tensor:
        if not _kept_here(cache) or not _fits(q_nope, call, batch):
            return reference_attention.latent_attention(q_nope, q_rope, cache, batch, call, chosen_Tk)
        q, longest = (q_nope, q_rope), batch.max_query_len
        ready = None if chosen_Tk is None else _ascending(chosen_Tk)
        # A recording repeats native ops alone: whoever makes one keeps long rows out of its replays.
        if exact or rt.recording or longest <= LATENT_SHORT:
            return native(q, cache, batch, call, ready, ALL)
        return _by_row(native(q, cache, batch, call, ready, LATENT_SHORT), q, cache, batch, call, chosen_Tk)

    return latent_attention


def _by_row(
    out: Tensor,
    q: tuple[Tensor, Tensor],
    cache: Tensor,
    batch: PagedBatch,
    call: LatentCall,
    chosen_Tk: Tensor | None,
) -> Tensor:
    """`out`, with the rows of many tokens, which the kernel left out, put in by the reference."""
    starts = batch.query_start.tolist()
    for row in range(len(starts) - 1):
        begin, end = starts[row], starts[row + 1]
        if end - begin > LATENT_SHORT:
            own = replace(
                batch,
                query_start=torch.tensor([0, end - begin], dtype=torch.int32),
                seq_lens=batch.seq_lens[row : row + 1],
                page_table=batch.page_table[row : row + 1],
            )
            chosen = None if chosen_Tk is None else chosen_Tk[begin:end]
            nope, rope = q[0][begin:end], q[1][begin:end]
            out[begin:end] = reference_attention.latent_attention(nope, rope, cache, own, call, chosen)
    return out


def _kept_here(cache: Tensor) -> bool:
    _, one, page_size, width = cache.shape
    return cache.dtype == torch.bfloat16 and one == 1 and cache.stride()[2:] == (width, 1) and page_size > 0


def _fits(q_nope: Tensor, call: LatentCall, batch: PagedBatch) -> bool:
    """Whether keys and values of a head come out of one matrix, [H, N + D, L], and the batch is as it is on
    the host."""
    (heads, nope, rank), value = call.w_uk.shape, call.w_uv.shape[2]
    step = (nope + value) * rank
    whole = call.w_uk.stride() == (step, rank, 1) and call.w_uv.stride() == (step, 1, rank)
    beside = call.w_uv.data_ptr() == call.w_uk.data_ptr() + nope * rank * call.w_uk.itemsize
    start, lens, table = batch.query_start, batch.seq_lens, batch.page_table
    plain = start.dtype == lens.dtype == table.dtype == torch.int32 and (table.stride(1) == 1 or table.shape[1] == 1)
    known = call.w_uk.dtype in (torch.float32, torch.bfloat16) and q_nope.dtype == torch.float32
    return whole and beside and plain and known and heads == q_nope.shape[1]


def _ascending(chosen_Tk: Tensor) -> Tensor:
    """In the order of the text, so that a choice of all positions gives the bits of no choice."""
    return chosen_Tk.masked_fill(chosen_Tk < 0, BEYOND).sort(-1)[0].to(torch.int32).contiguous()
