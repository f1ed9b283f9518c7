"""Jamba: Mamba 1 with norms on its steps, B and C; attention without rotation and experts in some layers."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from phloem.layers.moe import ExpertNames, softmax_experts
from phloem.layers.recurrent import Mamba1, SelectiveSizes
from phloem.models._common import Decoder, each_layer, usual, usual_attention, usual_mlp
from phloem.models._layer import Experts, LayerKind, Recurrent
from phloem.models.mamba import step_rank

if TYPE_CHECKING:
    from phloem.layers.context import BuildContext

DEFAULTS = {
    "attn_layer_offset": 4,
    "attn_layer_period": 8,
    "expert_layer_offset": 1,
    "expert_layer_period": 2,
    "num_experts": 16,
    "num_experts_per_tok": 2,
    "mamba_d_state": 16,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_dt_rank": "auto",
    "mamba_conv_bias": True,
    "mamba_proj_bias": False,
}
TINY = {
    "head_dim": None,
    "attn_layer_offset": 1,
    "attn_layer_period": 2,
    "num_experts": 6,
    "intermediate_size": 24,
    "mamba_d_state": 6,
}
VARIANTS = {
    "bias": {"mamba_proj_bias": True, "mamba_conv_bias": False, "mamba_dt_rank": 5, "tie_word_embeddings": True},
    "dense": {"num_experts": 1, "num_experts_per_tok": 1},
}


def build(config: dict[str, Any], ctx: BuildContext, max_positions: int) -> Decoder:
    eps, hidden = float(config.get("rms_norm_eps", 1e-6)), config["hidden_size"]
    sizes = SelectiveSizes(
        inner=config["mamba_expand"] * hidden,
        state=config["mamba_d_state"],
        rank=step_rank(config["mamba_dt_rank"], hidden),
        taps=config["mamba_d_conv"],
        bias=bool(config["mamba_proj_bias"]),
        conv_bias=bool(config["mamba_conv_bias"]),
        norm="weights",
        eps=eps,
    )
    mamba = Recurrent(Mamba1, sizes, "mamba")
    attention = usual_attention(config, rope=None, qkv_bias=False, out_bias=False)
    counts = config["num_experts"], config["num_experts_per_tok"], config["intermediate_size"]
    sparse = softmax_experts(*counts, config.get("hidden_act", "silu"), renormalise=False)
    experts = Experts(replace(sparse, names=ExpertNames(router="router")), "feed_forward")
    dense = usual_mlp(config, name="feed_forward")

    def layer(n: int) -> LayerKind:
        attends = n % config["attn_layer_period"] == config["attn_layer_offset"]
        expert = config["num_experts"] > 1 and n % config["expert_layer_period"] == config["expert_layer_offset"]
        names = ("input_layernorm", "pre_ff_layernorm")
        return LayerKind(attention if attends else mamba, experts if expert else dense, norm_names=names)

    config_of_all = usual(config, layers=each_layer(config, layer), norm_name="final_layernorm")
    return Decoder(ctx, config_of_all, max_positions)
