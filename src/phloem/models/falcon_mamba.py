"""Falcon Mamba: Mamba 1 whose steps, B and C are normalised, without weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from phloem.models.mamba import NEEDS as NEEDS
from phloem.models.mamba import TINY as TINY
from phloem.models.mamba import VARIANTS as VARIANTS
from phloem.models.mamba import selective

if TYPE_CHECKING:
    from phloem.layers.context import BuildContext
    from phloem.models._common import Decoder

DEFAULTS = {
    "layer_norm_epsilon": 1e-5,
    "expand": 2,
    "conv_kernel": 4,
    "state_size": 16,
    "time_step_rank": "auto",
    "use_bias": False,
    "use_conv_bias": True,
    "tie_word_embeddings": True,
    "mixer_rms_eps": 1e-6,
    "max_position_embeddings": 8192,  # no file says it
}


def build(config: dict[str, Any], ctx: BuildContext, max_positions: int) -> Decoder:
    return selective(config, ctx, max_positions, "weightless")
