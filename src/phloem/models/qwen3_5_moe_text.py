"""Qwen3.5 with experts, the language model alone: Qwen3.5's layers with Qwen3-Next's sparse block in each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from phloem.models._common import Decoder
from phloem.models.qwen3_next import DEFAULTS as DEFAULTS
from phloem.models.qwen3_next import TINY as TINY
from phloem.models.qwen3_next import experts, hybrid

if TYPE_CHECKING:
    from phloem.layers.context import BuildContext

NEEDS = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
GGUF = {
    "architecture": "qwen35moe",
    "hf_class": "Qwen3_5MoeForCausalLM",
    "keys": {
        "linear_key_head_dim": "ssm.state_size",
        "linear_num_key_heads": "ssm.group_count",
        "linear_num_value_heads": "ssm.time_step_rank",
        "linear_conv_kernel_dim": "ssm.conv_kernel",
        "full_attention_interval": ("full_attention_interval", 4),
        "num_experts": "expert_count",
        "num_experts_per_tok": "expert_used_count",
        "moe_intermediate_size": "expert_feed_forward_length",
        "shared_expert_intermediate_size": "expert_shared_feed_forward_length",
        "norm_topk_prob": ("expert_weights_norm", True),
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
        "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
        "mlp.shared_expert.up_proj": "ffn_up_shexp",
        "mlp.shared_expert.down_proj": "ffn_down_shexp",
        "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    },
    "unheeded": ("rope.dimension_sections", "attention.recurrent_layers"),  # tensors say which are
    "norm_shift": 1.0,
}


def build(config: dict[str, Any], ctx: BuildContext, max_positions: int) -> Decoder:
    sparse = experts(config)
    return hybrid(config, ctx, max_positions, lambda n: sparse, grouped=False)
