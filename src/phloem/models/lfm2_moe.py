"""LFM2 with experts behind the first layers: sigmoid routing with a correction."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

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
