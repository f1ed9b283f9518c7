"""Plain torch of what Gemma 3n computes over its streams of hidden states (AltUp, Baykal et al., 2023).

Legend as in `ops.py`; S streams.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def mix_streams(x_TSN: Tensor, mix_TSS: Tensor) -> Tensor:
    """Each stream and a mixture of all: x[s] + sum over r of mix[s, r] x[r]."""
    return (x_TSN.float() + torch.bmm(mix_TSS.float(), x_TSN.float())).to(x_TSN.dtype)


def spread_streams(x_TSN: Tensor, y_TN: Tensor, scale_TS: Tensor, more: float) -> Tensor:
    """One row added to each stream: x[s] + (scale[s] + more) y. `scale_TS` may have one row for all tokens."""
    added = (scale_TS.float() + more)[..., None] * y_TN.float()[:, None]
    return (x_TSN.float() + added).to(x_TSN.dtype)


def match_rms(x_TN: Tensor, like_TN: Tensor) -> Tensor:
    """x with the root mean square of the other's rows; that of x counts as at least the root of 1e-5."""
    wanted = like_TN.float().square().mean(-1, keepdim=True).sqrt()
    own = x_TN.float().square().mean(-1, keepdim=True).clamp_min(1e-5).sqrt()
    return (x_TN.float() * wanted / own).to(x_TN.dtype)


def sparsify(x_TN: Tensor, deviations: float) -> Tensor:
    """What is more than so many standard deviations above a row's mean, as far as it is; the rest is 0."""
    wide = x_TN.float()
    cut = wide.mean(-1, keepdim=True) + deviations * wide.std(-1, keepdim=True, unbiased=False)
    return F.relu(wide - cut).to(x_TN.dtype)
