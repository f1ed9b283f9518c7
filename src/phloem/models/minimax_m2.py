"""MiniMax-M2: sigmoid routing with a correction, a norm over the whole projections of q and k."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from phloem.kernels.specs import RouterSpec
from phloem.layers.moe import ExpertNames, ExpertsConfig
from phloem.models._common import Decoder, Trunk, each_layer, usual, usual_attention
from phloem.models._layer import Experts, LayerKind

if TYPE_CHECKING:
    from phloem.layers.context import BuildContext

DEFAULTS = {"rope_theta": 5e6, "head_dim": 128}
IGNORED = (r"(model\.)?mtp.*",)
GGUF = {
    "architecture": "minimax-m2",
    "hf_class": "MiniMaxM2ForCausalLM",
    "keys": {
        "num_local_experts": "expert_count",
        "num_experts_per_tok": "expert_used_count",
        "intermediate_size": "expert_feed_forward_length",
        "scoring_func": ("expert_gating_func", 2),  # sigmoid
    },
    "names": {
        "block_sparse_moe.gate": "ffn_gate_inp",
        "block_sparse_moe.experts.{}.w1": "ffn_gate_exps",
        "block_sparse_moe.experts.{}.w3": "ffn_up_exps",
        "block_sparse_moe.experts.{}.w2": "ffn_down_exps",
        "block_sparse_moe.e_score_correction_bias": "exp_probs_b.bias",
    },
}
TINY = {"num_local_experts": 6, "num_experts_per_tok": 2, "intermediate_size": 24}
VARIANTS = {
    "half": {
        "num_experts_per_tok": 3,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5000000.0, "partial_rotary_factor": 0.5},
    }
}

_NAMES = ExpertNames(
    gate="experts.{}.w1.weight",
    up="experts.{}.w3.weight",
    down="experts.{}.w2.weight",
    correction="e_score_correction_bias",
)


def build(config: dict[str, Any], ctx: BuildContext, max_positions: int) -> Decoder:
    if config.get("rotary_dim") and not (config.get("rope_parameters") or {}).get("partial_rotary_factor"):
        config = {**config, "partial_rotary_factor": config["rotary_dim"] / config["head_dim"]}
    router = RouterSpec(config["num_experts_per_tok"], "sigmoid", renormalise=True)
    sparse = ExpertsConfig(config["num_local_experts"], config["intermediate_size"], router, names=_NAMES)
    kind = LayerKind(usual_attention(config, qk_norm="whole"), Experts(sparse, "block_sparse_moe"))
    return Trunk(ctx, usual(config, layers=each_layer(config, lambda n: kind)), max_positions)
