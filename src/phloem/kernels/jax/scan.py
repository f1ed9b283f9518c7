"""Recurrent mixers in jax: one token after another by `lax.scan`, rows side by side. Legend as in `reference_scan.py`.

Steps are rows of one token each, or one row (as in `attention.py`), which may be padded: tokens behind a row's last
leave its state as it was. Q new tokens of a row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from collections.abc import Callable

HIGHEST = jax.lax.Precision.HIGHEST


def _by_rows(x_T: Any, starts: Any) -> Any:
    """[T, ..] as [R, Q, ..]."""
    rows, tokens = starts.shape[0] - 1, x_T.shape[0]
    if rows not in (1, tokens):
        raise ValueError(f"a step of {tokens} tokens in {rows} rows: not one row, and not rows of one token")
    return x_T.reshape(rows, tokens // rows, *x_T.shape[1:])


def _over(step: Callable[[Any, Any], tuple[Any, Any]], state_R: Any, tokens: tuple[Any, ...], starts: Any) -> Any:
    """`step`, (state [R, ..], a token's values [R, ..] each) -> (state, result [R, ..]), over each row's tokens; the
    results [T, ..] and the states behind each row's last."""
    lens = starts[1:] - starts[:-1]
    by_rows = tuple(jnp.swapaxes(_by_rows(x, starts).astype(jnp.float32), 0, 1) for x in tokens)  # [Q, R, ..]

    def one(state: Any, given: Any) -> tuple[Any, Any]:
        place, values = given
        after, out = step(state, values)
        inside = (place < lens).reshape(-1, *[1] * (state.ndim - 1))
        return jnp.where(inside, after, state), out

    last, out = jax.lax.scan(one, state_R.astype(jnp.float32), (jnp.arange(by_rows[0].shape[0]), by_rows))
    out = jnp.swapaxes(out, 0, 1)
    return out.reshape(-1, *out.shape[2:]), last.astype(state_R.dtype)


def causal_conv(
    x_TC: Any, weight_CW: Any, bias_C: Any, state_RCW: Any, starts: Any, silu: bool = True
) -> tuple[Any, Any]:
    """As `reference_scan.causal_conv`."""
    x_RQC = _by_rows(x_TC, starts).astype(jnp.float32)
    width, count = weight_CW.shape[1], x_RQC.shape[1]
    seen_RCL = jnp.concatenate((state_RCW.astype(jnp.float32), jnp.swapaxes(x_RQC, 1, 2)), 2)
    weight = weight_CW.astype(jnp.float32)
    y_RCQ = sum((seen_RCL[:, :, tap : tap + count] * weight[:, tap, None] for tap in range(width)), jnp.float32(0))
    if bias_C is not None:
        y_RCQ = y_RCQ + bias_C.astype(jnp.float32)[:, None]
    y_RCQ = jax.nn.silu(y_RCQ) if silu else y_RCQ
    kept = (starts[1:] - starts[:-1])[:, None, None] + jnp.arange(width - 1)
    states = jnp.take_along_axis(seen_RCL, jnp.broadcast_to(kept, state_RCW.shape), 2)
    return jnp.swapaxes(y_RCQ, 1, 2).reshape(x_TC.shape).astype(x_TC.dtype), states.astype(state_RCW.dtype)


def decays(log: Any) -> Any:
    return -jnp.exp(log)


def step_sizes(dt_TH: Any, bias_H: Any, lowest: float, highest: float) -> Any:
    return jnp.clip(jax.nn.softplus(dt_TH.astype(jnp.float32) + bias_H.astype(jnp.float32)), lowest, highest)


def delta_gates(a_TH: Any, b_TH: Any, bias_H: Any, log_H: Any) -> tuple[Any, Any]:
    steps = jax.nn.softplus(a_TH.astype(jnp.float32) + bias_H.astype(jnp.float32))
    return -jnp.exp(log_H.astype(jnp.float32)) * steps, jax.nn.sigmoid(b_TH.astype(jnp.float32))


def mamba2_scan(
    x_THD: Any, dt_TH: Any, decay_H: Any, b_TGS: Any, c_TGS: Any, skip_H: Any, state_RHDS: Any, starts: Any
) -> tuple[Any, Any]:
    """As `reference_scan.mamba2_scan`."""
    share = x_THD.shape[1] // b_TGS.shape[1]
    b_THS, c_THS = (jnp.repeat(v, share, 1) for v in (b_TGS, c_TGS))
    decay, skip = decay_H.astype(jnp.float32), skip_H.astype(jnp.float32)

    def step(state_RHDS: Any, values: Any) -> tuple[Any, Any]:
        x_RHD, dt_RH, b_RHS, c_RHS = values
        added = (dt_RH[..., None] * x_RHD)[..., None] * b_RHS[:, :, None]
        state_RHDS = jnp.exp(dt_RH * decay)[..., None, None] * state_RHDS + added
        return state_RHDS, jnp.einsum("rhds,rhs->rhd", state_RHDS, c_RHS, precision=HIGHEST) + skip[:, None] * x_RHD

    out, states = _over(step, state_RHDS, (x_THD, dt_TH, b_THS, c_THS), starts)
    return out.astype(x_THD.dtype), states


def selective_scan(
    x_TC: Any, dt_TC: Any, decay_CS: Any, b_TS: Any, c_TS: Any, skip_C: Any, state_RCS: Any, starts: Any
) -> tuple[Any, Any]:
    """As `reference_scan.selective_scan`."""
    decay, skip = decay_CS.astype(jnp.float32), skip_C.astype(jnp.float32)

    def step(state_RCS: Any, values: Any) -> tuple[Any, Any]:
        x_RC, dt_RC, b_RS, c_RS = values
        state_RCS = jnp.exp(dt_RC[..., None] * decay) * state_RCS + (dt_RC * x_RC)[..., None] * b_RS[:, None]
        return state_RCS, jnp.einsum("rcs,rs->rc", state_RCS, c_RS, precision=HIGHEST) + skip * x_RC

    out, states = _over(step, state_RCS, (x_TC, dt_TC, b_TS, c_TS), starts)
    return out.astype(x_TC.dtype), states


def gated_delta(
    q_THS: Any, k_THS: Any, v_THD: Any, decay_TH: Any, beta_TH: Any, state_RHSD: Any, starts: Any, scale: float
) -> tuple[Any, Any]:
    """As `reference_scan.gated_delta`."""

    def step(state_RHSD: Any, values: Any) -> tuple[Any, Any]:
        q_RHS, k_RHS, v_RHD, decay_RH, beta_RH = values
        state_RHSD = state_RHSD * jnp.exp(decay_RH)[..., None, None]
        held_RHD = jnp.einsum("rhs,rhsd->rhd", k_RHS, state_RHSD, precision=HIGHEST)
        change_RHD = (v_RHD - held_RHD) * beta_RH[..., None]
        state_RHSD = state_RHSD + k_RHS[..., None] * change_RHD[:, :, None]
        return state_RHSD, jnp.einsum("rhs,rhsd->rhd", q_RHS, state_RHSD, precision=HIGHEST) * scale

    out, states = _over(step, state_RHSD, (q_THS, k_THS, v_THD, decay_TH, beta_TH), starts)
    return out.astype(v_THD.dtype), states
