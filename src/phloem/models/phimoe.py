"""Phi-3.5-MoE: layer norms, biases, and experts of which each is weighed among those that come near it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from phloem.core.errors import ModelLoadError
from phloem.kernels.specs import RouterSpec
from phloem.layers.moe import ExpertNames, ExpertsConfig
from phloem.models._common import Decoder, each_layer, layer_types, usual, usual_attention
from phloem.models._layer import Experts, LayerKind

if TYPE_CHECKING:
    from phloem.layers.context import BuildContext

DEFAULTS = {"rope_theta": 1e6, "rms_norm_eps": 1e-5, "router_jitter_noise": 0.01, "num_experts_per_tok": 2}
GGUF = {
    "architecture": "phimoe",
    "hf_class": "PhimoeForCausalLM",
    "keys": {
        "num_local_experts": "expert_count",
        "num_experts_per_tok": "expert_used_count",
        "sliding_window": ("attention.sliding_window", 0),
    },
    "config": {"router_jitter_noise": 0.01},  # which no file says
    "flags": {"attention_bias": "attn_q.bias"},
    "names": {
        "block_sparse_moe.gate": "ffn_gate_inp",
        "block_sparse_moe.experts.{}.w1": "ffn_gate_exps",
        "block_sparse_moe.experts.{}.w2": "ffn_down_exps",
        "block_sparse_moe.experts.{}.w3": "ffn_up_exps",
    },
}
# Wide enough that now one expert is near the best, now several.
TINY = {"head_dim": None, "num_local_experts": 6, "intermediate_size": 24, "router_jitter_noise": 0.3}
VARIANTS = {
    "bias": {"attention_bias": True, "lm_head_bias": True, "sliding_window": 7},
    "longrope": {
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0, 1.1, 1.3, 1.5],
            "long_factor": [1.0, 2.0, 4.0, 8.0],
            "short_mscale": 1.2,
            "long_mscale": 1.3,
            "original_max_position_embeddings": 256,
        },
        "max_position_embeddings": 256,
    },
}

_NAMES = ExpertNames(gate="experts.{}.w1.weight", up="experts.{}.w3.weight", down="experts.{}.w2.weight")


def _scaled(config: dict[str, Any], max_positions: int) -> dict[str, Any]:
    """With the factor on cos and sin by its usual name: this family says two, for short and for long contexts."""
    rope = dict(config.get("rope_parameters") or {})
    if "short_mscale" in rope:
        long = max_positions > rope.get("original_max_position_embeddings", max_positions)
        rope["attention_factor"] = rope["long_mscale" if long else "short_mscale"]
    return {**config, "rope_parameters": rope}


def build(config: dict[str, Any], ctx: BuildContext, max_positions: int) -> Decoder:
    if config["num_experts_per_tok"] != 2:
        raise ModelLoadError(f"num_experts_per_tok {config['num_experts_per_tok']}: the family's router chooses 2")
    config = _scaled(config, max_positions)
    window = int(config.get("sliding_window") or 0)
    sliding = layer_types(config, [bool(window)] * config["num_hidden_layers"])
    router = RouterSpec(2, "sparse_mixer", jitter=float(config["router_jitter_noise"]))
    sparse = ExpertsConfig(config["num_local_experts"], config["intermediate_size"], router, names=_NAMES)

    def layer(n: int) -> LayerKind:
        attention = usual_attention(config, window=window if sliding[n] else 0)
        return LayerKind(attention, Experts(sparse, "block_sparse_moe"))

    whole = usual(
        config,
        layers=each_layer(config, layer),
        norms="layer",
        head_bias=bool(config.get("lm_head_bias", False)),
    )
    return Decoder(ctx, whole, max_positions)
