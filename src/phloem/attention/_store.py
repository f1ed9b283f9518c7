"""What every backend does before it attends: q and k are normalised and rotated as asked, k and v written to pages."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from phloem.kernels.ops import Ops
    from phloem.layers.context import Heads


def store(ops: Ops, heads: Heads, k_cache: Tensor, v_cache: Tensor, slots_T: Tensor) -> Tensor:
    """Write k and v at `slots_T`; gives q, ready for attention. With a rotation, q and k are used up.

    The one place that decides between the table's fused op and its separate ones. A backend whose cache type the table
    does not keep has put another `write_kv` into its table, and taken the fused op out (`reference.fitting`).
    """
    q_THD, k_TKD, v_TKD, rotation = heads.q, heads.k, heads.v, heads.rotation
    if rotation is None:
        ops.write_kv(k_TKD, v_TKD, k_cache, v_cache, slots_T)
        return q_THD
    if ops.rope_write_kv is not None:
        return ops.rope_write_kv(q_THD, k_TKD, v_TKD, rotation, k_cache, v_cache, slots_T)
    if rotation.q_norm is not None and rotation.k_norm is not None:
        q_THD = ops.rms_norm(q_THD, rotation.q_norm, rotation.eps)
        k_TKD = ops.rms_norm(k_TKD, rotation.k_norm, rotation.eps)
    ops.rope_(q_THD, k_TKD, rotation.positions, rotation.cos_sin, rotation.interleaved)
    ops.write_kv(k_TKD, v_TKD, k_cache, v_cache, slots_T)
    return q_THD
