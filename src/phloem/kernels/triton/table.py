"""The op tables made of Triton kernels. Dense matrix products are torch's own (the vendor's BLAS); how others are
multiplied is in `weights.py`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from phloem.kernels.calls import Adapters, LinearOp, Norm
from phloem.kernels.compose import linear_of
from phloem.kernels.ops import Ops
from phloem.kernels.triton import (
    activation,
    attention,
    gates,
    invariant,
    lora,
    mla,
    moe,
    narrow,
    pages,
    recurrent,
    rope,
    route,
    sample,
    scan,
    sparse,
    tokens,
    weights,
)
from phloem.kernels.triton import norm as norms


def _linear(product: Callable[[Tensor, Any, Tensor | None], Tensor]) -> LinearOp:
    return linear_of(
        product,
        rms_norm=norms.rms_norm,
        add_rms_norm=norms.add_rms_norm,
        silu_and_mul=activation.silu_and_mul,
        gelu_tanh_and_mul=activation.gelu_tanh_and_mul,
        add_adapters=lora.add_adapters,
    )


def _with_float8(linear: LinearOp) -> LinearOp:
    """The op, with a norm that writes float8 itself where the product behind it reads that."""
    gates = {"silu": activation.silu_and_mul, "gelu_tanh": activation.gelu_tanh_and_mul}

    def fused(
        x: Tensor,
        weight: Any,
        bias: Tensor | None = None,
        *,
        norm: Norm | None = None,
        residual: Tensor | None = None,
        gate: str = "",
        add: Tensor | None = None,
        adapter: Adapters | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        if norm is None or adapter is not None or add is not None or not weights.takes_float8(weight, x):
            return linear(x, weight, bias, norm=norm, residual=residual, gate=gate, add=add, adapter=adapter)
        grouped = isinstance(weight, weights.Float8Blocks)
        kind = weight.values.dtype
        values, scale, total = norms.rms_norm_fp8(x, residual, norm.weight, norm.eps, kind, grouped=grouped)
        out = weights.scaled(values, scale, weight, bias, x.dtype)
        return gates[gate](out) if gate else out, total

    return fused


def table() -> Ops:
    """The fast table."""
    return Ops(
        name="triton",
        prepare_linear=narrow.prepare_linear,
        linear=_with_float8(_linear(weights.product)),
        embedding=narrow.embedding,
        rms_norm=norms.rms_norm,
        add_rms_norm=norms.add_rms_norm,
        add=activation.add,
        silu_and_mul=activation.silu_and_mul,
        gelu_tanh_and_mul=activation.gelu_tanh_and_mul,
        softcap=activation.softcap,
        select_rows=pages.select_rows,
        rope_=rope.rope_,
        write_kv=rope.write_kv,
        rope_write_kv=rope.rope_write_kv,
        mrope_table=rope.mrope_table,
        paged_attention=attention.paged_attention,
        write_latent=sparse.write_latent,
        latent_attention=mla.latent_attention,
        choose_keys=sparse.choose_keys,
        chosen_latent_attention=sparse.chosen_latent_attention,
        prepare_experts=narrow.prepare_experts,
        stack_experts=narrow.stack_experts,
        moe=moe.moe,
        chosen_experts=moe.chosen_experts,
        chooses_apart=True,
        stacks_alike=True,
        route=route.route_op,
        experts=moe.experts_op,
        causal_conv=recurrent.causal_conv,
        pooled_states=True,
        gated_delta=recurrent.gated_delta,
        decays=gates.decays,
        step_sizes=gates.step_sizes,
        delta_gates=gates.delta_gates,
        gated_rms_norm=gates.gated_rms_norm,
        mamba2_scan=scan.mamba2_scan,
        selective_scan=scan.selective_scan,
        argmax=sample.argmax,
        logsumexp=sample.logsumexp,
        mask_tokens_=sample.mask_tokens_,
        sample=sample.sample,
        late_tokens_=tokens.late_tokens_,
        keep_tokens_=tokens.keep_tokens_,
        refill=narrow.refill,
        rewriting=narrow.rewriting,
        memory=narrow.memory,
    )


def invariant_table() -> Ops:
    """The batch-invariant table: the same bits for a token whatever else is in the batch."""
    dense = _linear(invariant.product)
    return replace(
        table(),
        name="invariant",
        prepare_linear=narrow.prepare_plain,
        prepare_experts=narrow.plain_experts,
        stack_experts=narrow.plain_experts,
        linear=dense,
        paged_attention=invariant.paged_attention,
        # By chunks, a token's bits would follow from where its prompt was cut.
        mamba2_scan=partial(scan.mamba2_scan, short=0),
    )
