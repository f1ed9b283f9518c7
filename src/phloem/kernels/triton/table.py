"""The op tables made of Triton kernels. Dense matrix products are torch's own (the vendor's BLAS); how others are
multiplied is in `weights.py`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from phloem.kernels.calls import LinearOp
from phloem.kernels.compose import linear_of
from phloem.kernels.ops import Ops
from phloem.kernels.triton import (
    activation,
    attention,
    invariant,
    lora,
    mla,
    moe,
    norm,
    pages,
    rope,
    sample,
    tokens,
    weights,
)


def _linear(product: Callable[[Tensor, Any, Tensor | None], Tensor]) -> LinearOp:
    return linear_of(
        product,
        rms_norm=norm.rms_norm,
        add_rms_norm=norm.add_rms_norm,
        silu_and_mul=activation.silu_and_mul,
        gelu_tanh_and_mul=activation.gelu_tanh_and_mul,
        add_adapters=lora.add_adapters,
    )


def table() -> Ops:
    """The fast table."""
    return Ops(
        name="triton",
        linear=_linear(weights.product),
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
        latent_attention=mla.latent_attention,
        moe=moe.moe,
        argmax=sample.argmax,
        logsumexp=sample.logsumexp,
        mask_tokens_=sample.mask_tokens_,
        sample=sample.sample,
        late_tokens_=tokens.late_tokens_,
        keep_tokens_=tokens.keep_tokens_,
    )


def invariant_table() -> Ops:
    """The batch-invariant table: the same bits for a token whatever else is in the batch."""
    dense = _linear(invariant.product)
    return replace(table(), name="invariant", linear=dense, paged_attention=invariant.paged_attention)
