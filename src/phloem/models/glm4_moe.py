"""GLM-4.5 to 4.7: sigmoid routing with a correction, a dense block beside the experts, half of each head turns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from phloem.kernels.specs import RouterSpec
from phloem.layers.moe import ExpertNames, ExpertsConfig
from phloem.models._common import Decoder, each_layer, layer_number, usual, usual_attention, usual_mlp
from phloem.models._layer import Experts, LayerKind

if TYPE_CHECKING:
    from phloem.layers.context import BuildContext

DEFAULTS = {
    "partial_rotary_factor": 0.5,
    "norm_topk_prob": True,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
TINY = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "use_qk_norm": True,
    "attention_bias": True,
    "routed_scaling_factor": 2.5,
}
VARIANTS = {
    "groups": {"n_group": 4, "topk_group": 2, "n_shared_experts": 2, "use_qk_norm": False, "norm_topk_prob": False}
}

_NAMES = ExpertNames(correction="gate.e_score_correction_bias")


class Glm4Moe(Decoder):
    """A decoder whose files hold a layer more, which drafts and is not used here."""

    def checkpoint_name(self, name: str) -> str | None:
        return None if layer_number(name) >= len(self.layers) else name


def build(config: dict[str, Any], ctx: BuildContext, max_positions: int) -> Decoder:
    router = RouterSpec(
        config["num_experts_per_tok"],
        "sigmoid",
        renormalise=bool(config["norm_topk_prob"]),
        eps=1e-20,
        scale=float(config.get("routed_scaling_factor", 1.0)),
        groups=config["n_group"],
        keep=config["topk_group"],
    )
    inner = config["moe_intermediate_size"]
    sparse = ExpertsConfig(config["n_routed_experts"], inner, router, names=_NAMES)
    shared = usual_mlp(config, inner_size=inner * int(config.get("n_shared_experts") or 1), name="shared_experts")
    qk_norm = "head" if config.get("use_qk_norm") else ""
    attention = usual_attention(config, qk_norm=qk_norm, out_bias=False)

    def layer(n: int) -> LayerKind:
        dense = n < config["first_k_dense_replace"]
        return LayerKind(attention, usual_mlp(config) if dense else Experts(sparse, shared=shared))

    return Glm4Moe(ctx, usual(config, layers=each_layer(config, layer)), max_positions)
