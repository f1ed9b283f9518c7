"""gpt-oss: a sparse block in every layer, windows on every other one, and a sink for each head.

Experts are stacked with rows of gate and up alternating; their activation is clamped. The router has a bias, and its
softmax is over the chosen experts alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from phloem.kernels.specs import ExpertSpec, RouterSpec
from phloem.layers.moe import ExpertNames, ExpertsConfig
from phloem.models._common import Decoder, each_layer, layer_types, usual, usual_attention
from phloem.models._layer import Experts, LayerKind

if TYPE_CHECKING:
    from phloem.layers.context import BuildContext

DEFAULTS = {"rope_theta": 150000.0}
GGUF = {
    "architecture": "gpt-oss",
    "hf_class": "GptOssForCausalLM",
    "keys": {
        "num_local_experts": "expert_count",
        "num_experts_per_tok": "expert_used_count",
        "intermediate_size": "expert_feed_forward_length",
        "sliding_window": "attention.sliding_window",
    },
    "config": {"projections_apart": True, "yarn": {"truncate": False}},
    "names": {
        "post_attention_layernorm": "post_attention_norm",
        "self_attn.sinks": "attn_sinks.weight",
        "mlp.router": "ffn_gate_inp",
        "mlp.experts.gate_proj_bias": "ffn_gate_exps.bias",
        "mlp.experts.up_proj_bias": "ffn_up_exps.bias",
        "mlp.experts.down_proj_bias": "ffn_down_exps.bias",
    },
}
TINY = {
    "num_local_experts": 6,
    "num_experts_per_tok": 2,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "sliding_window": 6,
    "attention_bias": True,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 150000.0,
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 16,
    },
}
VARIANTS = {"one-expert": {"num_experts_per_tok": 1}}

_NAMES = ExpertNames(
    router="router",
    gate="experts.gate_up_proj",
    up="experts.gate_up_proj",
    down="experts.down_proj",
    gate_bias="experts.gate_up_proj_bias",
    up_bias="experts.gate_up_proj_bias",
    down_bias="experts.down_proj_bias",
    transposed=True,
    alternating=True,
)
# In GGUF files gate and up lie apart, and matrices are the usual way round.
_APART = ExpertNames(
    router="router",
    gate_bias="experts.gate_proj_bias",
    up_bias="experts.up_proj_bias",
    down_bias="experts.down_proj_bias",
)


def build(config: dict[str, Any], ctx: BuildContext, max_positions: int) -> Decoder:
    window, count = int(config.get("sliding_window") or 0), config["num_local_experts"]
    sliding = layer_types(config, [n % 2 == 0 for n in range(config["num_hidden_layers"])])
    clamped = ExpertSpec(
        count,
        "swiglu_clamp",
        limit=float(config.get("swiglu_limit") or 7.0),
        alpha=float(config.get("swiglu_alpha") or 1.702),
    )
    names = _APART if config.get("projections_apart") else _NAMES
    router = RouterSpec(config["num_experts_per_tok"], "chosen_softmax")
    experts = Experts(ExpertsConfig(count, config["intermediate_size"], router, clamped, True, names))

    def layer(n: int) -> LayerKind:
        return LayerKind(usual_attention(config, window=window if sliding[n] else 0, sinks="sinks"), experts)

    return Decoder(ctx, usual(config, layers=each_layer(config, layer)), max_positions)
