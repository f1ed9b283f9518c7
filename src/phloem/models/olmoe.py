"""OLMoE: a sparse block in every layer, and a norm over the whole projections of q and k."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from phloem.core.errors import ModelLoadError
from phloem.layers.moe import softmax_experts
from phloem.models._common import Decoder, each_layer, usual, usual_attention
from phloem.models._layer import Experts, LayerKind

if TYPE_CHECKING:
    from phloem.layers.context import BuildContext

DEFAULTS = {"norm_topk_prob": False, "rms_norm_eps": 1e-5}
GGUF = {
    "architecture": "olmoe",
    "hf_class": "OlmoeForCausalLM",
    "keys": {
        "num_experts": "expert_count",
        "num_experts_per_tok": "expert_used_count",
        "norm_topk_prob": ("expert_weights_norm", False),
    },
}
TINY = {"head_dim": None, "num_experts": 6, "num_experts_per_tok": 2, "intermediate_size": 24}
VARIANTS = {"renormalised": {"norm_topk_prob": True, "num_experts_per_tok": 3}}


def build(config: dict[str, Any], ctx: BuildContext, max_positions: int) -> Decoder:
    if config.get("clip_qkv") is not None:
        raise ModelLoadError("clip_qkv: no published model of the family clips, and it is not served")
    sizes = config["num_experts"], config["num_experts_per_tok"], config["intermediate_size"]
    sparse = softmax_experts(*sizes, config.get("hidden_act", "silu"), bool(config["norm_topk_prob"]))
    kind = LayerKind(usual_attention(config, qk_norm="whole"), Experts(sparse))
    return Decoder(ctx, usual(config, layers=each_layer(config, lambda n: kind)), max_positions)
