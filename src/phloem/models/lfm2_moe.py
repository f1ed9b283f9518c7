"""LFM2 with experts behind the first layers: sigmoid routing with a correction."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from phloem.core.errors import ModelLoadError
from phloem.kernels.specs import RouterSpec
from phloem.layers.moe import ExpertNames, ExpertsConfig
from phloem.models._common import Decoder, usual_mlp
from phloem.models._layer import Experts
from phloem.models.lfm2 import hybrid

if TYPE_CHECKING:
    from phloem.layers.context import BuildContext
    from phloem.models._layer import MakeFeed

DEFAULTS = {
    "norm_eps": 1e-5,
    "conv_L_cache": 3,
    "conv_bias": False,
    "rope_theta": 1e6,
    "num_dense_layers": 2,
    "use_expert_bias": True,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
}
GGUF = {
    "architecture": "lfm2moe",
    "hf_class": "Lfm2MoeForCausalLM",
    "keys": {
        "norm_eps": "attention.layer_norm_rms_epsilon",
        "conv_L_cache": "shortconv.l_cache",
        "num_dense_layers": "leading_dense_block_count",
        "num_experts": "expert_count",
        "num_experts_per_tok": "expert_used_count",
        "moe_intermediate_size": "expert_feed_forward_length",
        "routed_scaling_factor": ("expert_weights_scale", 1.0),
        "norm_topk_prob": ("expert_weights_norm", True),
        "scoring_func": ("expert_gating_func", 2),  # sigmoid
    },
    "config": {"conv_bias": False},
    "flags": {"use_expert_bias": "exp_probs_b.bias"},
    "layers_with": {"full_attn_idxs": "attn_q.weight"},
    "names": {
        "operator_norm": "attn_norm",
        "ffn_norm": "ffn_norm",
        "self_attn.out_proj": "attn_output",
        "self_attn.q_layernorm": "attn_q_norm",
        "self_attn.k_layernorm": "attn_k_norm",
        "conv.conv": "shortconv.conv",
        "conv.in_proj": "shortconv.in_proj",
        "conv.out_proj": "shortconv.out_proj",
        "feed_forward.gate_proj": "ffn_gate",
        "feed_forward.up_proj": "ffn_up",
        "feed_forward.down_proj": "ffn_down",
        "feed_forward.gate": "ffn_gate_inp",
        "feed_forward.expert_bias": "exp_probs_b.bias",
        "feed_forward.experts.{}.w1": "ffn_gate_exps",
        "feed_forward.experts.{}.w3": "ffn_up_exps",
        "feed_forward.experts.{}.w2": "ffn_down_exps",
    },
}
TINY = {
    "num_hidden_layers": 4,
    "head_dim": None,
    "num_dense_layers": 1,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "layer_types": ["conv", "full_attention", "conv", "full_attention"],
}
VARIANTS = {"plain": {"use_expert_bias": False, "norm_topk_prob": False, "routed_scaling_factor": 1.5}}


def build(config: dict[str, Any], ctx: BuildContext, max_positions: int) -> Decoder:
    names = ExpertNames(
        gate="experts.{}.w1.weight",
        up="experts.{}.w3.weight",
        down="experts.{}.w2.weight",
        correction="expert_bias" if config["use_expert_bias"] else "",
    )
    if config.get("scoring_func", 2) != 2:
        raise ModelLoadError(f"expert_gating_func {config['scoring_func']}: routers score by a sigmoid (2)")
    router = RouterSpec(
        config["num_experts_per_tok"],
        "sigmoid",
        renormalise=bool(config["norm_topk_prob"]),
        eps=1e-6,
        scale=float(config["routed_scaling_factor"]),
    )
    sparse = Experts(
        ExpertsConfig(config["num_experts"], config["moe_intermediate_size"], router, names=names), "feed_forward"
    )
    dense, first = usual_mlp(config, name="feed_forward"), int(config["num_dense_layers"])
    feeds: list[MakeFeed] = [dense if n < first else sparse for n in range(config["num_hidden_layers"])]
    return hybrid(config, ctx, max_positions, feeds)
