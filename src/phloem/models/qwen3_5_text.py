"""Qwen3.5, the language model alone: gated delta nets whose projections lie apart, gated attention, dense blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from phloem.models._common import Decoder, usual_mlp
from phloem.models.qwen3_next import DEFAULTS as DEFAULTS
from phloem.models.qwen3_next import hybrid

if TYPE_CHECKING:
    from phloem.layers.context import BuildContext

# The converter has put the value heads of a key head as far from each other as there are key heads.
GGUF = {
    "architecture": "qwen35",
    "hf_class": "Qwen3_5ForCausalLM",
    "keys": {
        "linear_key_head_dim": "ssm.state_size",
        "linear_num_key_heads": "ssm.group_count",
        "linear_num_value_heads": "ssm.time_step_rank",
        "linear_conv_kernel_dim": "ssm.conv_kernel",
        "full_attention_interval": ("full_attention_interval", 4),
    },
    "config": {"tiled_values": True, "partial_rotary_factor": 1.0},
    "kinds": {"layer_types": {"ssm_out.weight": "linear_attention", "attn_q.weight": "full_attention"}},
    "shares": {"linear_value_head_dim": ("ssm.inner_size", "ssm.time_step_rank")},
    "names": {
        "post_attention_layernorm": "post_attention_norm",
        "linear_attn.in_proj_qkv": "attn_qkv",
        "linear_attn.in_proj_z": "attn_gate",
        "linear_attn.in_proj_b": "ssm_beta",
        "linear_attn.in_proj_a": "ssm_alpha",
    },
    "unheeded": ("rope.dimension_sections", "attention.recurrent_layers"),  # tensors say which are
    "norm_shift": 1.0,
}
TINY = {
    "num_hidden_layers": 3,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 24,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}
VARIANTS = {"tied": {"tie_word_embeddings": True, "linear_num_value_heads": 2}}


def build(config: dict[str, Any], ctx: BuildContext, max_positions: int) -> Decoder:
    block = usual_mlp(config)
    return hybrid(config, ctx, max_positions, lambda n: block, grouped=False)
