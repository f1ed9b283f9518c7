"""What every backend does before it attends: q and k are normalised and rotated as asked, k and v written to pages;
and how a layer's constants become a call, or a reason to decline it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from phloem.kernels.calls import AttentionCall

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from phloem.kernels.calls import Cache
    from phloem.kernels.ops import Ops
    from phloem.layers.context import AttentionSpec, Heads


def call_of(spec: AttentionSpec, sinks_H: Tensor | None) -> AttentionCall:
    """What a layer asks of an attention kernel."""
    return AttentionCall(
        spec.scale, spec.window, spec.softcap, sinks_H, causal=spec.causal, chunk=spec.chunk, block=spec.block
    )


def unserved(specs: Sequence[AttentionSpec], *, values: bool = False, blocks: bool = False) -> str | None:
    """Why a backend of plain attention declines these layers, or None. `values`: value heads may have their own size;
    `blocks`: it attends causally by blocks too.

    Layers that read what another has written ask nothing of a kernel: `store` serves them.
    """
    for spec in specs:
        if not spec.causal:
            return "has no attention to later tokens"
        if spec.chunk or (spec.block and not blocks):
            return f"has no attention by {'chunks' if spec.chunk else 'blocks'} of positions"
        if spec.block and spec.window:
            return "has no blocks of positions in a window"
        if spec.values != spec.head_size and not values:
            return f"has no value heads of {spec.values} beside key heads of {spec.head_size}"
    return None


def store(ops: Ops, spec: AttentionSpec, heads: Heads, cache: Cache, slots_T: Tensor) -> Tensor:
    """Write k and v at `slots_T`; gives q, ready for attention. With a rotation, q and k are used up. Of a layer that
    does not write, k and v are not looked at.

    The one place that decides between the table's fused op and its separate ones. A backend whose cache type the table
    does not keep has put another `write_kv` into its table, and taken the fused op out (`reference.fitting`).
    """
    if not spec.writes:
        return _only_q(ops, heads)
    k_cache, v_cache = cache
    q_THD, k_TKD, v_TKD, rotation = heads.q, heads.k, heads.v, heads.rotation
    if rotation is None:
        ops.write_kv(k_TKD, v_TKD, k_cache, v_cache, slots_T)
        return q_THD
    if ops.rope_write_kv is not None and v_TKD.shape == k_TKD.shape:
        return ops.rope_write_kv(q_THD, k_TKD, v_TKD, rotation, k_cache, v_cache, slots_T)
    if rotation.q_norm is not None and rotation.k_norm is not None:
        q_THD = ops.rms_norm(q_THD, rotation.q_norm, rotation.eps)
        k_TKD = ops.rms_norm(k_TKD, rotation.k_norm, rotation.eps)
    ops.rope_(q_THD, k_TKD, rotation.positions, rotation.cos_sin, rotation.interleaved)
    ops.write_kv(k_TKD, v_TKD, k_cache, v_cache, slots_T)
    return q_THD


def _only_q(ops: Ops, heads: Heads) -> Tensor:
    q_THD, rotation = heads.q, heads.rotation
    if rotation is None:
        return q_THD
    if rotation.q_norm is not None:
        q_THD = ops.rms_norm(q_THD, rotation.q_norm, rotation.eps)
    ops.rope_(q_THD, q_THD[:, :0], rotation.positions, rotation.cos_sin, rotation.interleaved)
    return q_THD
