"""K-EXAONE: EXAONE 4's attention behind norms of its own, sigmoid routing with a correction, a dense block beside."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from phloem.layers.moe import ExpertNames
from phloem.models._common import Decoder, each_layer, usual, usual_mlp
from phloem.models._layer import LayerKind
from phloem.models.deepseek_v3 import grouped_experts
from phloem.models.exaone4 import attentions

if TYPE_CHECKING:
    from phloem.layers.context import BuildContext

IGNORED = (r"mtp.*",)
DEFAULTS = {
    "norm_topk_prob": True,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_shared_experts": 1,
    "routed_scaling_factor": 2.5,
}
GGUF = {
    "architecture": "exaone-moe",
    "hf_class": "ExaoneMoeForCausalLM",
    "keys": {
        "sliding_window": ("attention.sliding_window", 0),
        "layer_types": ("attention.sliding_window_pattern", None),
        "num_experts": "expert_count",
        "num_experts_per_tok": "expert_used_count",
        "num_shared_experts": "expert_shared_count",
        "moe_intermediate_size": "expert_feed_forward_length",
        "first_k_dense_replace": "leading_dense_block_count",
        "routed_scaling_factor": ("expert_weights_scale", 1.0),
        "norm_topk_prob": ("expert_weights_norm", True),
        "n_group": ("expert_group_count", 1),
        "topk_group": ("expert_group_used_count", 1),
        "scoring_func": ("expert_gating_func", 2),
        "num_nextn_predict_layers": ("nextn_predict_layers", 0),
    },
    "names": {
        "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
        "mlp.shared_experts.up_proj": "ffn_up_shexp",
        "mlp.shared_experts.down_proj": "ffn_down_shexp",
        "mlp.e_score_correction_bias": "exp_probs_b.bias",
    },
    "unheeded": ("expert_shared_feed_forward_length",),  # its tensors have it too
}
TINY = {
    "head_dim": None,
    "num_hidden_layers": 4,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "sliding_window": 6,
    "sliding_window_pattern": 4,
}
VARIANTS = {"groups": {"n_group": 4, "topk_group": 2, "num_shared_experts": 2, "first_k_dense_replace": 2}}

_NAMES = ExpertNames(correction="e_score_correction_bias")


def build(config: dict[str, Any], ctx: BuildContext, max_positions: int) -> Decoder:
    sizes = {"n_routed_experts": config["num_experts"], "n_shared_experts": config["num_shared_experts"]}
    sparse = grouped_experts({**config, **sizes})
    sparse = replace(sparse, config=replace(sparse.config, names=_NAMES))
    made, kinds = attentions(config), config.get("mlp_layer_types")

    def layer(n: int) -> LayerKind:
        dense = kinds[n] == "dense" if kinds else n < config["first_k_dense_replace"]
        return LayerKind(made[n], usual_mlp(config) if dense else sparse)

    return Decoder(ctx, usual(config, layers=each_layer(config, layer)), max_positions)
