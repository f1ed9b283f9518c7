"""Qwen3 with experts: every layer, or every n-th, has a sparse block in place of the MLP."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from phloem.layers.moe import softmax_experts
from phloem.models._common import Decoder, each_layer, usual, usual_attention, usual_mlp
from phloem.models._layer import Experts, LayerKind
from phloem.models.qwen2 import windows

if TYPE_CHECKING:
    from phloem.layers.context import BuildContext

GGUF = {
    "architecture": "qwen3moe",
    "hf_class": "Qwen3MoeForCausalLM",
    "also": ("qwen3vlmoe",),  # whose tower is another file: it serves texts alone, to which all its axes are one
    "unheeded": ("rope.dimension_sections", "n_deepstack_layers"),
    "keys": {
        "num_experts": "expert_count",
        "num_experts_per_tok": "expert_used_count",
        "moe_intermediate_size": "expert_feed_forward_length",
        # Files say it only where they differ from what the family's checkpoints do.
        "norm_topk_prob": ("expert_weights_norm", True),
    },
    "layers_with": {"mlp_only_layers": "ffn_gate.weight"},
}
TINY = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True}
VARIANTS = {
    "sparse-step": {"decoder_sparse_step": 2, "norm_topk_prob": False},
    "dense-layer": {"mlp_only_layers": [1], "num_experts_per_tok": 1},
}


def build(config: dict[str, Any], ctx: BuildContext, max_positions: int) -> Decoder:
    experts = softmax_experts(
        count=config["num_experts"],
        per_token=config["num_experts_per_tok"],
        inner_size=config["moe_intermediate_size"],
        activation=config.get("hidden_act", "silu"),
        renormalise=bool(config.get("norm_topk_prob", False)),
    )
    step, dense = int(config.get("decoder_sparse_step", 1)), config.get("mlp_only_layers") or []
    sizes = windows(config)

    def layer(n: int) -> LayerKind:
        sparse = (n + 1) % step == 0 and n not in dense
        attention = usual_attention(config, window=sizes[n], qk_norm="head")
        return LayerKind(attention, Experts(experts) if sparse else usual_mlp(config))

    return Decoder(ctx, usual(config, layers=each_layer(config, layer)), max_positions)
