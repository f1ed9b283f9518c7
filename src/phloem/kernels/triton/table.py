"""The op tables made of Triton kernels. Dense matrix products are torch's own (the vendor's BLAS)."""

from __future__ import annotations

from dataclasses import replace

from phloem.kernels.ops import Ops
from phloem.kernels.triton import activation, attention, invariant, moe, norm, pages, rope, sample


def table() -> Ops:
    """The fast table."""
    return Ops(
        name="triton",
        embedding=pages.embedding,
        rms_norm=norm.rms_norm,
        add_rms_norm=norm.add_rms_norm,
        add=activation.add,
        silu_and_mul=activation.silu_and_mul,
        gelu_tanh_and_mul=activation.gelu_tanh_and_mul,
        softcap=activation.softcap,
        select_rows=pages.select_rows,
        rope_=rope.rope_,
        write_kv=rope.write_kv,
        rope_write_kv=rope.rope_write_kv,
        paged_attention=attention.paged_attention,
        moe=moe.moe,
        argmax=sample.argmax,
        logsumexp=sample.logsumexp,
        mask_tokens_=sample.mask_tokens_,
        sample=sample.sample,
    )


def invariant_table() -> Ops:
    """The batch-invariant table: the same bits for a token whatever else is in the batch."""
    return replace(table(), name="invariant", linear=invariant.linear, paged_attention=invariant.paged_attention)
