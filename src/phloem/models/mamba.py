"""Mamba 1: selective state spaces alone."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

from phloem.layers.recurrent import Mamba1, SelectiveSizes
from phloem.models._common import each_layer, usual
from phloem.models._layer import LayerKind, Recurrent
from phloem.models.mamba2 import Mamba2Model

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
}
GGUF = {
    "architecture": "mamba",
    "hf_class": "MambaForCausalLM",
    "keys": {
        "layer_norm_epsilon": "attention.layer_norm_rms_epsilon",
        "mamba_inner": "ssm.inner_size",
        "state_size": "ssm.state_size",
        "conv_kernel": "ssm.conv_kernel",
        "time_step_rank": "ssm.time_step_rank",
        "normalised": ("ssm.dt_b_c_rms", False),
    },
    "flags": {"use_bias": "ssm_in.bias", "use_conv_bias": "ssm_conv1d.bias"},
    "names": {"norm": "attn_norm"},
}
NEEDS = ("vocab_size", "hidden_size", "num_hidden_layers", "state_size")
TINY = {
    "intermediate_size": None,
    "num_attention_heads": None,
    "num_key_value_heads": None,
    "head_dim": None,
    "state_size": 6,
}
VARIANTS = {
    "bias": {"use_bias": True, "use_conv_bias": False, "time_step_rank": 5, "conv_kernel": 3},
    "untied": {"tie_word_embeddings": False, "expand": 3},
}


def step_rank(value: Any, hidden_size: int) -> int:
    """Of what the steps are made of; "auto": a sixteenth of the hidden size."""
    return math.ceil(hidden_size / 16) if value == "auto" else int(value)


def selective(
    config: dict[str, Any], ctx: BuildContext, max_positions: int, norm: Literal["", "weightless"]
) -> Decoder:
    """`norm`: as `SelectiveSizes`."""
    hidden, eps = config["hidden_size"], float(config["layer_norm_epsilon"])
    sizes = SelectiveSizes(
        inner=config.get("mamba_inner") or int(config["expand"] * hidden),
        state=config["state_size"],
        rank=step_rank(config["time_step_rank"], hidden),
        taps=config["conv_kernel"],
        bias=bool(config["use_bias"]),
        conv_bias=bool(config["use_conv_bias"]),
        norm=norm,
        eps=float(config.get("mixer_rms_eps", 1e-6)),
    )
    kind = LayerKind(Recurrent(Mamba1, sizes, "mixer"), None, "alone")
    config_of_all = usual(config, layers=each_layer(config, lambda n: kind), eps=eps, norm_name="norm_f")
    return Mamba2Model(ctx, config_of_all, max_positions)


def build(config: dict[str, Any], ctx: BuildContext, max_positions: int) -> Decoder:
    return selective(config, ctx, max_positions, "")
