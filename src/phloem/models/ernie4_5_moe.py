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
TINY = {"moe_num_experts": 6, "moe_k": 2, "moe_intermediate_size": 24}
VARIANTS = {
    "some": {"moe_layer_interval": 2, "num_hidden_layers": 5, "moe_layer_end_index": 3, "use_bias": True, "moe_k": 3},
    "alone": {"moe_num_shared_experts": 0, "tie_word_embeddings": False, "moe_layer_start_index": 0},
}

_NAMES = ExpertNames(correction="moe_statics.e_score_correction_bias", correction_row=True)


def build(config: dict[str, Any], ctx: BuildContext, max_positions: int) -> Decoder:
    head_size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    router = RouterSpec(config["moe_k"], renormalise=True, floor=float(config["moe_norm_min"]))
    bias, inner = bool(config.get("use_bias", False)), config["moe_intermediate_size"]
    sparse = ExpertsConfig(config["moe_num_experts"], inner, router, names=_NAMES)
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
