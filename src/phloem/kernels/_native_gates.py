"""Around recurrent and latent mixers in the native table: states, factors, gates; each as its namesake in
`reference_models` or `reference_scan`. What is of another type or shape than the kernels take is torch's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from phloem.kernels import reference_models as models
from phloem.kernels import reference_scan as scan
from phloem.kernels._native_basic import rows_of

if TYPE_CHECKING:
    from torch import Tensor

    from phloem.kernels._native_runtime import Runtime


def ops(rt: Runtime) -> dict[str, Any]:
    """The table's entries; none where the library lacks the kernels."""
    if not rt.has("read_states"):
        return {}
    return {**_states(rt), **_factors(rt), **_products(rt), **_gates(rt), **_delta(rt)}


def _flat(x: Tensor) -> Tensor | None:
    """`x` as float32 [T, N] with the rows of its first axis; None: torch computes."""
    if x.dtype != torch.float32 or x.dim() < 2 or (x.dim() > 2 and not x.is_contiguous()):
        return None
    return rows_of(x) if x.dim() == 2 else x.view(len(x), -1)


def _states(rt: Runtime) -> dict[str, Any]:
    READ, WRITE = rt.op("read_states"), rt.op("write_states")

    def fits(pool: Tensor, index_R: Tensor) -> bool:
        whole = pool.dtype == torch.float32 and (len(pool) == 0 or pool[0].is_contiguous())
        return whole and index_R.dtype == torch.int64 and index_R.is_contiguous()

    def read_states(pool: Tensor, index_R: Tensor, fresh_R: Tensor) -> Tensor:
        if not fits(pool, index_R):
            return scan.read_states(pool, index_R, fresh_R)
        rows, n = len(index_R), pool[0].numel()
        out = rt.empty((rows, *pool.shape[1:]))
        rt.call(
            READ, rows * n // 8, pool=pool.data_ptr(), out=out.data_ptr(), index=index_R.data_ptr(),
            fresh=fresh_R.data_ptr(), rows=rows, n=n, stride=pool.stride(0),
        )  # fmt: skip
        return out

    def write_states(pool: Tensor, index_R: Tensor, after: Tensor) -> None:
        if not fits(pool, index_R) or after.dtype != torch.float32 or not after.is_contiguous():
            scan.write_states(pool, index_R, after)
            return
        rows, n = len(index_R), pool[0].numel()
        rt.call(
            WRITE, rows * n // 8, pool=pool.data_ptr(), out=after.data_ptr(), index=index_R.data_ptr(), fresh=None,
            rows=rows, n=n, stride=pool.stride(0),
        )  # fmt: skip

    return {"read_states": read_states, "write_states": write_states}


def _factors(rt: Runtime) -> dict[str, Any]:
    JOIN, SCALE = rt.op("join"), rt.op("scale")

    def join(x: Tensor, y: Tensor) -> Tensor:
        if x.dim() != 2 or y.dim() != 2 or not x.dtype == y.dtype == torch.float32:
            return models.join(x, y)
        x_TN, y_TM = rows_of(x), rows_of(y)
        (rows, n), m = x_TN.shape, y_TM.shape[1]
        if y_TM.shape[0] != rows:
            raise ValueError(f"cannot join {list(y.shape)} to {list(x.shape)}")
        out = rt.empty((rows, n + m))
        rt.call(
            JOIN, rows * (n + m) // 8, x=x_TN.data_ptr(), y=y_TM.data_ptr(), out=out.data_ptr(), rows=rows, n=n, m=m,
            x_stride=x_TN.stride(0), y_stride=y_TM.stride(0),
        )  # fmt: skip
        return out

    def scaled(x: Tensor, factors: Tensor | None, factor: float) -> Tensor | None:
        x_TN = _flat(x)
        if x_TN is None:
            return None
        (rows, n), out = x_TN.shape, rt.empty(x.shape)
        rt.call(
            SCALE, rows * n // 8, x=x_TN.data_ptr(), factors=None if factors is None else factors.data_ptr(),
            out=out.data_ptr(), rows=rows, n=n, x_stride=x_TN.stride(0), factor=factor,
        )  # fmt: skip
        return out

    def scale(x: Tensor, factor: float) -> Tensor:
        found = scaled(x, None, factor)
        return models.scale(x, factor) if found is None else found

    def scale_rows(x: Tensor, scale_T: Tensor) -> Tensor:
        plain = scale_T.dtype == torch.float32 and scale_T.shape == (len(x),) and scale_T.is_contiguous()
        found = scaled(x, scale_T, 1.0) if plain else None
        return models.scale_rows(x, scale_T) if found is None else found

    return {"join": join, "scale": scale, "scale_rows": scale_rows}


def _products(rt: Runtime) -> dict[str, Any]:
    MUL, SIGMOID = rt.op("mul"), rt.op("sigmoid_mul")

    def product(handle: int, cost: int, x: Tensor, y: Tensor, single: bool) -> Tensor | None:
        cut = [one.unsqueeze(1) if one.dim() == 2 else one for one in (x, y)]
        if any(one.dtype != torch.float32 or one.dim() != 3 for one in cut):
            return None
        (rows, parts, n), out = cut[0].shape, rt.empty(x.shape)
        if any(one.stride(2) != 1 and one.shape[2] > 1 for one in cut):
            return None
        rt.call(
            handle, rows * parts * n // cost, x=x.data_ptr(), y=y.data_ptr(), out=out.data_ptr(), rows=rows,
            parts=parts, n=n, x_stride=x.stride(0), y_stride=y.stride(0), x_part=cut[0].stride(1),
            y_part=cut[1].stride(1), single=single,
        )  # fmt: skip
        return out

    def mul(x: Tensor, y: Tensor) -> Tensor:
        found = product(MUL, 8, x, y, False) if x.shape == y.shape else None
        return models.mul(x, y) if found is None else found

    def sigmoid_mul(x: Tensor, gate: Tensor) -> Tensor:
        single = gate.shape == (*x.shape[:-1], 1) and x.shape[-1] > 1
        found = product(SIGMOID, 2, x, gate, single) if single or gate.shape == x.shape else None
        return models.sigmoid_mul(x, gate) if found is None else found

    return {"mul": mul, "sigmoid_mul": sigmoid_mul}


def _gates(rt: Runtime) -> dict[str, Any]:
    NORM, STEPS, DECAYS = rt.op("gated_rms_norm"), rt.op("step_sizes"), rt.op("decays")

    def gated_rms_norm(
        x: Tensor, gate: Tensor, weight: Tensor, eps: float, group: int = 0, norm_first: bool = False
    ) -> Tensor:
        """Of [T, N] by groups, or of each head of [T, H, N]."""
        n = group or x.shape[-1]
        plain = x.dtype == gate.dtype == weight.dtype == torch.float32 and weight.is_contiguous()
        if not plain or x.shape != gate.shape or x.dim() not in (2, 3) or (x.dim() == 3 and n != x.shape[-1]):
            return models.gated_rms_norm(x, gate, weight, eps, group, norm_first)
        cut = (x.unflatten(-1, (-1, n)), gate.unflatten(-1, (-1, n))) if x.dim() == 2 else (x, gate)
        if any(one.stride(-1) != 1 and n > 1 for one in cut):
            return models.gated_rms_norm(x, gate, weight, eps, group, norm_first)
        (rows, parts, _), out = cut[0].shape, rt.empty(x.shape)
        rt.call(
            NORM, rows * parts * n, x=x.data_ptr(), gate=gate.data_ptr(), weight=weight.data_ptr(), out=out.data_ptr(),
            rows=rows, parts=parts, n=n, x_stride=x.stride(0), gate_stride=gate.stride(0), x_part=cut[0].stride(1),
            gate_part=cut[1].stride(1), weight_part=n if x.dim() == 2 else 0, norm_first=norm_first, eps=eps,
        )  # fmt: skip
        return out

    def step_sizes(dt_TH: Tensor, bias_H: Tensor, lowest: float, highest: float) -> Tensor:
        if dt_TH.dtype != torch.float32 or bias_H.dtype != torch.float32 or not bias_H.is_contiguous():
            return scan.step_sizes(dt_TH, bias_H, lowest, highest)
        x_TH = rows_of(dt_TH)
        (rows, n), out = x_TH.shape, rt.empty(dt_TH.shape)
        rt.call(
            STEPS, rows * n * 10, x=x_TH.data_ptr(), bias=bias_H.data_ptr(), out=out.data_ptr(), rows=rows, n=n,
            x_stride=x_TH.stride(0), lowest=lowest, highest=highest,
        )  # fmt: skip
        return out

    def decays(log: Tensor) -> Tensor:
        if log.dtype != torch.float32 or not log.is_contiguous():
            return scan.decays(log)
        out = rt.empty(log.shape)
        rt.call(DECAYS, log.numel(), log=log.data_ptr(), out=out.data_ptr(), n=log.numel())
        return out

    return {"gated_rms_norm": gated_rms_norm, "step_sizes": step_sizes, "decays": decays}


def _delta(rt: Runtime) -> dict[str, Any]:
    GATES, REPEAT = rt.op("delta_gates"), rt.op("repeat_heads")

    def delta_gates(a: Tensor, b_TH: Tensor, bias: Tensor, log: Tensor) -> tuple[Tensor, Tensor]:
        tokens, heads = b_TH.shape
        n = a.shape[2] if a.dim() == 3 else 1
        plain = a.dtype == b_TH.dtype == bias.dtype == log.dtype == torch.float32
        packed = bias.is_contiguous() and log.is_contiguous() and a.stride()[1:] == ((n, 1) if a.dim() == 3 else (1,))
        if not plain or not packed or b_TH.stride(1) != 1:
            return scan.delta_gates(a, b_TH, bias, log)
        decay, beta = rt.empty(a.shape), rt.empty(b_TH.shape)
        rt.call(
            GATES, tokens * heads * n * 10, a=a.data_ptr(), b=b_TH.data_ptr(), bias=bias.data_ptr(), log=log.data_ptr(),
            decay=decay.data_ptr(), beta=beta.data_ptr(), rows=tokens, heads=heads, n=n, a_stride=a.stride(0),
            b_stride=b_TH.stride(0),
        )  # fmt: skip
        return decay, beta

    def repeat_heads(x_THD: Tensor, share: int, tiled: bool) -> Tensor:
        if x_THD.dtype != torch.float32 or not x_THD.is_contiguous():
            return scan.repeat_heads(x_THD, share, tiled)
        tokens, heads, n = x_THD.shape
        out = rt.empty((tokens, heads * share, n))
        rt.call(
            REPEAT, tokens * heads * share * n // 8, x=x_THD.data_ptr(), out=out.data_ptr(), tokens=tokens,
            heads=heads, share=share, n=n, tiled=tiled,
        )  # fmt: skip
        return out

    return {"delta_gates": delta_gates, "repeat_heads": repeat_heads}
