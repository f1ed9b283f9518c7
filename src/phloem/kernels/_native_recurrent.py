"""Recurrent mixers in the native table: `reference_scan` says what they mean, csrc/cpu/each/recurrent.cpp how."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from phloem.kernels import reference_scan as reference
from phloem.kernels._native_basic import heads_of, rows_of

if TYPE_CHECKING:
    from torch import Tensor

    from phloem.kernels._native_runtime import Runtime


def ops(rt: Runtime) -> dict[str, Any]:
    return {"causal_conv": _convolution(rt), "mamba2_scan": _scan(rt), "gated_delta": _delta(rt)}


def _plain(name: str, tensor: Tensor, *shape: int) -> Tensor:
    """Contiguous float32 of a shape."""
    if tensor.shape != shape:
        raise ValueError(f"{name} must be {list(shape)}, not {list(tensor.shape)}")
    return tensor.to(torch.float32).contiguous()


def _starts(query_start: Tensor, rows: int) -> Tensor:
    if query_start.shape != (rows + 1,):
        raise ValueError(f"query_start must have {rows + 1} entries, not {list(query_start.shape)}")
    return query_start.to(torch.int32).contiguous()


def _convolution(rt: Runtime) -> Any:
    call, empty = rt.call, rt.empty
    CONV, MOST = rt.op("causal_conv"), rt.constant("recurrent.kMaxTaps")

    def causal_conv(
        x_TC: Tensor,
        weight_CW: Tensor,
        bias_C: Tensor | None,
        state_RCW: Tensor,
        query_start: Tensor,
        silu: bool = True,
    ) -> tuple[Tensor, Tensor]:
        (channels, taps), rows = weight_CW.shape, len(state_RCW)
        if taps > MOST:
            return reference.causal_conv(x_TC, weight_CW, bias_C, state_RCW, query_start, silu)
        x = rows_of(x_TC)
        weight, state = (
            _plain("weight", weight_CW, channels, taps),
            _plain("state", state_RCW, rows, channels, taps - 1),
        )
        bias = None if bias_C is None else _plain("bias", bias_C, channels)
        starts = _starts(query_start, rows)
        out, after = empty(x.shape), empty(state.shape)
        call(
            CONV, len(x) * channels * taps, x=x.data_ptr(), weight=weight.data_ptr(),
            bias=0 if bias is None else bias.data_ptr(), state=state.data_ptr(), out=out.data_ptr(),
            after=after.data_ptr(), query_start=starts.data_ptr(), rows=rows, channels=channels, taps=taps,
            x_stride=x.stride(0), silu=silu,
        )  # fmt: skip
        return out, after

    return causal_conv


def _scan(rt: Runtime) -> Any:
    call, empty = rt.call, rt.empty
    SCAN = rt.op("mamba2_scan")

    def mamba2_scan(
        x_THD: Tensor,
        dt_TH: Tensor,
        decay_H: Tensor,
        b_TGS: Tensor,
        c_TGS: Tensor,
        skip_H: Tensor,
        state_RHDS: Tensor,
        query_start: Tensor,
    ) -> tuple[Tensor, Tensor]:
        rows, heads, size, n = state_RHDS.shape
        tokens, groups = len(x_THD), b_TGS.shape[1]
        x, b, c = (_heads(one) for one in (x_THD, b_TGS, c_TGS))
        dt, decay = _plain("dt", dt_TH, tokens, heads), _plain("decay", decay_H, heads)
        skip, state = _plain("skip", skip_H, heads), _plain("state", state_RHDS, rows, heads, size, n)
        starts = _starts(query_start, rows)
        out, after = empty((tokens, heads, size)), empty(state.shape)
        call(
            SCAN, tokens * heads * size * n, x=x.data_ptr(), dt=dt.data_ptr(), decay=decay.data_ptr(), b=b.data_ptr(),
            c=c.data_ptr(), skip=skip.data_ptr(), state=state.data_ptr(), out=out.data_ptr(), after=after.data_ptr(),
            query_start=starts.data_ptr(), rows=rows, heads=heads, size=size, groups=groups, n=n,
            x_stride=x.stride(0), b_stride=b.stride(0), c_stride=c.stride(0),
        )  # fmt: skip
        return out, after

    return mamba2_scan


def _delta(rt: Runtime) -> Any:
    call, empty = rt.call, rt.empty
    DELTA, MOST = rt.op("gated_delta"), rt.constant("recurrent.kMaxKey")

    def gated_delta(
        q_THS: Tensor,
        k_THS: Tensor,
        v_THD: Tensor,
        decay_TH: Tensor,
        beta_TH: Tensor,
        state_RHSD: Tensor,
        query_start: Tensor,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        rows, heads, n, size = state_RHSD.shape
        if n > MOST:
            return reference.gated_delta(q_THS, k_THS, v_THD, decay_TH, beta_TH, state_RHSD, query_start, scale)
        tokens = len(q_THS)
        q, k, v = (_heads(one) for one in (q_THS, k_THS, v_THD))
        decay, beta = _plain("decay", decay_TH, tokens, heads), _plain("beta", beta_TH, tokens, heads)
        state, starts = _plain("state", state_RHSD, rows, heads, n, size), _starts(query_start, rows)
        out, after = empty((tokens, heads, size)), empty(state.shape)
        call(
            DELTA, 2 * tokens * heads * size * n, q=q.data_ptr(), k=k.data_ptr(), v=v.data_ptr(),
            decay=decay.data_ptr(), beta=beta.data_ptr(), state=state.data_ptr(), out=out.data_ptr(),
            after=after.data_ptr(), query_start=starts.data_ptr(), rows=rows, heads=heads, n=n, size=size,
            q_stride=q.stride(0), k_stride=k.stride(0), v_stride=v.stride(0), scale=scale,
        )  # fmt: skip
        return out, after

    return gated_delta


def _heads(x_THD: Tensor) -> Tensor:
    """Float32 whose heads lie one after another in each token."""
    outer, inner = heads_of(x_THD)
    del outer
    return x_THD if inner == x_THD.shape[-1] or x_THD.shape[1] == 1 else x_THD.contiguous()
