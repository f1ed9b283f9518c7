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


GGUF = {
    "architecture": "mamba",
    "hf_class": "FalconMambaForCausalLM",
    "normed": True,
    "keys": {
        "layer_norm_epsilon": "attention.layer_norm_rms_epsilon",
        "mamba_inner": "ssm.inner_size",
        "state_size": "ssm.state_size",
        "conv_kernel": "ssm.conv_kernel",
        "time_step_rank": "ssm.time_step_rank",
        "normalised": ("ssm.dt_b_c_rms", True),
    },
    "flags": {"use_bias": "ssm_in.bias", "use_conv_bias": "ssm_conv1d.bias"},
    "names": {"norm": "attn_norm"},
}


def build(config: dict[str, Any], ctx: BuildContext, max_positions: int) -> Decoder:
    return selective(config, ctx, max_positions, "weightless")
