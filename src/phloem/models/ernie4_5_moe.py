"""ERNIE 4.5 MoE: softmax routing with a correction, a dense block beside the experts, neighbours paired."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from phloem.kernels.specs import RouterSpec
from phloem.layers.moe import ExpertNames, ExpertsConfig
from phloem.layers.rope import rope_spec
from phloem.models._common import Decoder, each_layer, usual, usual_attention, usual_mlp
from phloem.models._layer import Experts, LayerKind

if TYPE_CHECKING:
    from phloem.layers.context import BuildContext

DEFAULTS = {
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "rope_theta": 500000.0,
    "moe_layer_start_index": 1,
    "moe_layer_end_index": -1,
    "moe_layer_interval": 1,
    "moe_num_shared_experts": 2,
    "moe_norm_min": 1e-12,
}
SPELLING = {"moe_k": "num_experts_per_tok", "moe_num_experts": "num_experts"}
IGNORED = (r"(model\.)?mtp.*",)
# What files say of the shared block's width is not what its tensors have: those are of all shared experts.
GGUF = {
    "architecture": "ernie4_5-moe",
    "hf_class": "Ernie4_5_MoeForCausalLM",
    "keys": {
        "moe_num_experts": "expert_count",
        "moe_k": "expert_used_count",
        "moe_intermediate_size": "expert_feed_forward_length",
        "moe_num_shared_experts": ("expert_shared_count", 0),
        "moe_layer_start_index": ("leading_dense_block_count", 0),
        "moe_layer_interval": ("interleave_moe_layer_step", 1),
        "shared_width": ("expert_shared_feed_forward_length", None),
    },
    "config": {"correction_row": False, "moe_norm_min": 1e-12, "moe_layer_end_index": -1},
    "flags": {"use_bias": "attn_q.bias"},
    "names": {
        "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
        "mlp.shared_experts.up_proj": "ffn_up_shexp",
        "mlp.shared_experts.down_proj": "ffn_down_shexp",
        "mlp.moe_statics.e_score_correction_bias": "exp_probs_b.bias",
    },
}
TINY = {"moe_num_experts": 6, "moe_k": 2, "moe_intermediate_size": 24}
VARIANTS = {
    "some": {"moe_layer_interval": 2, "num_hidden_layers": 5, "moe_layer_end_index": 3, "use_bias": True, "moe_k": 3},
    "alone": {"moe_num_shared_experts": 0, "tie_word_embeddings": False, "moe_layer_start_index": 0},
}


def build(config: dict[str, Any], ctx: BuildContext, max_positions: int) -> Decoder:
    head_size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    names = ExpertNames(
        correction="moe_statics.e_score_correction_bias", correction_row=bool(config.get("correction_row", True))
    )
    router = RouterSpec(config["moe_k"], renormalise=True, floor=float(config["moe_norm_min"]))
    bias, inner = bool(config.get("use_bias", False)), config["moe_intermediate_size"]
    sparse = ExpertsConfig(config["moe_num_experts"], inner, router, names=names)
    dense = usual_mlp(config, bias=bias)
    shared = None
    if config["moe_num_shared_experts"]:
        width = inner * config["moe_num_shared_experts"]
        shared = usual_mlp(config, inner_size=width, bias=bias, name="shared_experts")
    rope = rope_spec(config, head_size, interleaved=True)
    attention = usual_attention(config, rope=rope, qkv_bias=bias, out_bias=bias)
    last = config["moe_layer_end_index"]
    last = config["num_hidden_layers"] - 1 if last == -1 else last

    def layer(n: int) -> LayerKind:
        among = config["moe_layer_start_index"] <= n <= last and (n + 1) % config["moe_layer_interval"] == 0
        return LayerKind(attention, Experts(sparse, shared=shared) if among else dense)

    return Decoder(ctx, usual(config, layers=each_layer(config, layer), head_bias=bias), max_positions)
