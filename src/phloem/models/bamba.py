"""Bamba: Mamba 2 with attention in some layers, half of whose head turns, and a gated block in every layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from phloem.layers.recurrent import Mamba2, MambaSizes
from phloem.models._common import Decoder, each_layer, usual, usual_attention, usual_mlp
from phloem.models._layer import LayerKind, Recurrent
from phloem.models.mamba2 import number

if TYPE_CHECKING:
    from phloem.layers.context import BuildContext

DEFAULTS = {
    "mamba_n_heads": 128,
    "mamba_n_groups": 1,
    "mamba_d_state": 256,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_conv_bias": True,
    "mamba_proj_bias": False,
    "partial_rotary_factor": 0.5,
}
GGUF = {
    "architecture": "granitehybrid",
    "hf_class": "BambaForCausalLM",
    "unscaled": True,
    "keys": {
        "mamba_d_ssm": "ssm.inner_size",
        "mamba_n_heads": "ssm.time_step_rank",
        "mamba_n_groups": "ssm.group_count",
        "mamba_d_state": "ssm.state_size",
        "mamba_d_conv": "ssm.conv_kernel",
    },
    "config": {"partial_rotary_factor": 1.0},
    "flags": {
        "mamba_conv_bias": "ssm_conv1d.bias",
        "mamba_proj_bias": "ssm_in.bias",
        "attention_bias": "attn_q.bias",
        "attention_out_bias": "attn_output.bias",
    },
    "layers_with": {"attn_layer_indices": "attn_q.weight"},
    "shares": {"mamba_d_head": ("ssm.inner_size", "ssm.time_step_rank")},
    "names": {
        "pre_ff_layernorm": "ffn_norm",
        "feed_forward.gate_proj": "ffn_gate",
        "feed_forward.up_proj": "ffn_up",
        "feed_forward.down_proj": "ffn_down",
    },
    "turned": ("q_proj", "k_proj"),
}
TINY = {
    "head_dim": None,
    "mamba_n_heads": 8,
    "mamba_d_state": 8,
    "mamba_chunk_size": 8,
    "attn_layer_indices": [1],
}
VARIANTS = {
    "bias": {"mamba_proj_bias": True, "mamba_conv_bias": False, "mamba_n_groups": 2, "attention_bias": True},
    "tied": {"tie_word_embeddings": True, "mlp_bias": True},
}


def mamba_sizes(config: dict[str, Any], **differences: Any) -> MambaSizes:
    """Sizes of a Mamba 2 layer whose keys in config.json begin with `mamba_`."""
    inner = config.get("mamba_d_ssm") or config["mamba_expand"] * config["hidden_size"]
    lowest, highest = (number(value) for value in config.get("time_step_limit") or (0.0, float("inf")))
    return MambaSizes(
        heads=config["mamba_n_heads"],
        head_size=inner // config["mamba_n_heads"],
        groups=config["mamba_n_groups"],
        state=config["mamba_d_state"],
        taps=config["mamba_d_conv"],
        eps=float(config.get("rms_norm_eps", 1e-5)),
        bias=bool(config["mamba_proj_bias"]),
        conv_bias=bool(config["mamba_conv_bias"]),
        lowest=lowest,
        highest=highest,
        **differences,
    )


def build(config: dict[str, Any], ctx: BuildContext, max_positions: int) -> Decoder:
    attention, feed = usual_attention(config), usual_mlp(config, name="feed_forward")
    mamba, attends = Recurrent(Mamba2, mamba_sizes(config), "mamba"), config.get("attn_layer_indices") or ()
    names = ("input_layernorm", "pre_ff_layernorm")

    def layer(n: int) -> LayerKind:
        return LayerKind(attention if n in attends else mamba, feed, norm_names=names)

    config_of_all = usual(config, layers=each_layer(config, layer), norm_name="final_layernorm")
    return Decoder(ctx, config_of_all, max_positions)
