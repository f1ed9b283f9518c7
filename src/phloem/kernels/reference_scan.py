"""Plain torch of recurrent mixers: causal convolution, Mamba 1 and 2, gated delta nets, token after token.

Rows of a step are packed: tokens of row r are `[query_start[r], query_start[r + 1])`. Each op is given the states that
the rows had before this step, `[R, ...]`, and gives those after it; what was read is left as it was.
Legend: T tokens, R rows, C channels, H heads, D head size, S state size, G groups. States are float32.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def causal_conv(
    x_TC: Tensor,
    weight_CW: Tensor,
    bias_C: Tensor | None,
    state_RCW: Tensor,
    query_start: Tensor,
    silu: bool = True,
) -> tuple[Tensor, Tensor]:
    """Depthwise convolution over the last W tokens of a row, perhaps with SiLU behind it.

    Args:
        weight_CW: the last column is the token's own.
        state_RCW: [R, C, W - 1], the inputs before this step, the oldest first; zeros at a row's start.

    Returns:
        y [T, C] and the inputs that the next step needs.
    """
    width, starts = weight_CW.shape[1], query_start.tolist()
    out, states = torch.empty_like(x_TC), torch.empty_like(state_RCW)
    for row in range(len(starts) - 1):
        if starts[row] == starts[row + 1]:
            states[row] = state_RCW[row]
            continue
        new_CT = x_TC[starts[row] : starts[row + 1]].T.float()
        seen_CL = torch.cat((state_RCW[row].float(), new_CT), 1)
        bias = None if bias_C is None else bias_C.float()
        y_CT = F.conv1d(seen_CL[None], weight_CW.float()[:, None], bias, groups=len(weight_CW))[0]
        out[starts[row] : starts[row + 1]] = (F.silu(y_CT) if silu else y_CT).T.to(out.dtype)
        states[row] = seen_CL[:, seen_CL.shape[1] - (width - 1) :].to(states.dtype)
    return out, states


def read_states(pool: Tensor, index_R: Tensor, fresh_R: Tensor) -> Tensor:
    """The states [R, ...] at these places of a pool; zeros for rows that begin."""
    found = pool[index_R]
    return found.masked_fill(fresh_R.view(-1, *[1] * (found.ndim - 1)), 0)


def write_states(pool: Tensor, index_R: Tensor, after: Tensor) -> None:
    """Put states [R, ...] at these places; which of two rows at one place (scratch) stays is not said."""
    pool[index_R] = after.to(pool.dtype)


def repeat_heads(x_THD: Tensor, share: int, tiled: bool) -> Tensor:
    """Each head `share` times, one beside the other; tiled: all heads, one time after another."""
    return x_THD.repeat(1, share, 1) if tiled else x_THD.repeat_interleave(share, 1)


def decays(log: Tensor) -> Tensor:
    """What an entry of the state decays by, at most 0, of the logarithm that checkpoints have: -exp(log)."""
    return -log.exp()


def step_sizes(dt_TH: Tensor, bias_H: Tensor, lowest: float, highest: float) -> Tensor:
    """How far each token moves each head's state: softplus(dt + bias) within bounds, float32 [T, H]."""
    return F.softplus(dt_TH.float() + bias_H.float()).clamp(lowest, highest)


def delta_gates(a_TH: Tensor, b_TH: Tensor, bias_H: Tensor, log_H: Tensor) -> tuple[Tensor, Tensor]:
    """Of a gated delta net, float32 [T, H]: the logarithm of what a token keeps of the state, and how much of its own
    it writes; (-exp(log) softplus(a + bias), sigmoid(b)). The first by entries of a key too: a [T, H, S], bias [H, S],
    log [H, 1]."""
    return -log_H.float().exp() * F.softplus(a_TH.float() + bias_H.float()), torch.sigmoid(b_TH.float())


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
    """State space duality, as a recurrence (Dao and Gu, 2024).

    h = exp(dt * decay) h + dt x (x) b, y = h c + skip x, for each head; a group of heads shares b and c. `dt_TH` is
    ready to use (bias, softplus and bounds applied), `decay_H` is negative.

    Returns:
        y [T, H, D] and the states after the rows' last tokens.
    """
    starts, share = query_start.tolist(), x_THD.shape[1] // b_TGS.shape[1]
    out, states = torch.empty_like(x_THD), state_RHDS.float().clone()
    b_THS, c_THS = (v.float().repeat_interleave(share, 1) for v in (b_TGS, c_TGS))
    for row in range(len(starts) - 1):
        state_HDS = states[row]
        for t in range(starts[row], starts[row + 1]):
            x_HD, dt_H = x_THD[t].float(), dt_TH[t].float()
            kept_H = torch.exp(dt_H * decay_H.float())
            added = (dt_H[:, None] * x_HD)[:, :, None] * b_THS[t][:, None, :]
            state_HDS = kept_H[:, None, None] * state_HDS + added
            y_HD = torch.einsum("hds,hs->hd", state_HDS, c_THS[t]) + skip_H.float()[:, None] * x_HD
            out[t] = y_HD.to(out.dtype)
        states[row] = state_HDS
    return out, states.to(state_RHDS.dtype)


def selective_scan(
    x_TC: Tensor,
    dt_TC: Tensor,
    decay_CS: Tensor,
    b_TS: Tensor,
    c_TS: Tensor,
    skip_C: Tensor,
    state_RCS: Tensor,
    query_start: Tensor,
) -> tuple[Tensor, Tensor]:
    """Mamba 1 (Gu and Dao, 2023): every channel has steps of its own, and every entry of its state a decay.

    h = exp(dt decay) h + dt x b, y = h . c + skip x. `dt_TC` and `decay_CS` as in `mamba2_scan`.

    Returns:
        y [T, C] and the states after the rows' last tokens.
    """
    starts = query_start.tolist()
    out, states = torch.empty_like(x_TC), state_RCS.float().clone()
    for row in range(len(starts) - 1):
        state_CS = states[row]
        for t in range(starts[row], starts[row + 1]):
            x_C, dt_C1 = x_TC[t].float(), dt_TC[t].float()[:, None]
            state_CS = torch.exp(dt_C1 * decay_CS.float()) * state_CS + dt_C1 * x_C[:, None] * b_TS[t].float()
            out[t] = (state_CS @ c_TS[t].float() + skip_C.float() * x_C).to(out.dtype)
        states[row] = state_CS
    return out, states.to(state_RCS.dtype)


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
    """The gated delta rule (Yang et al., 2024): a state of keys and values that overwrites what a key held.

    state = exp(decay) state; state += k (x) beta (v - k state); y = scale q state. `decay_TH` is the logarithm, at most
    0, or one for each entry of a key, [T, H, S] (Kimi Delta Attention, 2025); q and k are normalised by the caller, one
    head of them for each head of v.

    Returns:
        y [T, H, D] and the states after the rows' last tokens.
    """
    starts = query_start.tolist()
    out, states = torch.empty_like(v_THD), state_RHSD.float().clone()
    for row in range(len(starts) - 1):
        state_HSD = states[row]
        for t in range(starts[row], starts[row + 1]):
            q_HS, k_HS, v_HD = q_THS[t].float(), k_THS[t].float(), v_THD[t].float()
            state_HSD = state_HSD * torch.exp(decay_TH[t].float()).view(len(q_HS), -1, 1)
            held_HD = torch.einsum("hs,hsd->hd", k_HS, state_HSD)
            change_HD = (v_HD - held_HD) * beta_TH[t].float()[:, None]
            state_HSD = state_HSD + k_HS[:, :, None] * change_HD[:, None, :]
            out[t] = (torch.einsum("hs,hsd->hd", q_HS, state_HSD) * scale).to(out.dtype)
        states[row] = state_HSD
    return out, states.to(state_RHSD.dtype)
