"""LLaDA 2.0: the router of DeepSeek V3 over Ling 2.0's layers, which see their own block both ways.

It writes by diffusion, block after block; a place's logits are of its own token, not of the next one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from phloem.core.errors import ModelLoadError
from phloem.kernels.specs import RouterSpec
from phloem.layers.moe import ExpertNames, ExpertsConfig
from phloem.models._common import Decoder, each_layer, usual, usual_attention, usual_mlp
from phloem.models._layer import Experts, LayerKind

if TYPE_CHECKING:
    from phloem.layers.context import BuildContext

DEFAULTS = {
    "block_size": 32,
    "mask_token_id": 156895,
    "partial_rotary_factor": 0.5,
    "rope_theta": 600000.0,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "use_qk_norm": True,
    "num_shared_experts": 1,
    "n_group": 8,
    "topk_group": 4,
    "first_k_dense_replace": 1,
}
DIFFUSION = {"block": "block_size", "mask": "mask_token_id"}
TINY = {
    "block_size": 8,
    "mask_token_id": 2,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_group": 2,
    "topk_group": 1,
    "written": {"model.embed_tokens.": "model.word_embeddings."},
}
VARIANTS = {
    "blocks-of-32": {"block_size": 32},
    "no-groups": {"n_group": 1, "topk_group": 1, "num_shared_experts": 2, "use_qkv_bias": True, "use_bias": True},
}


class LLaDA2(Decoder):
    """A decoder whose files call the embedding otherwise."""

    def checkpoint_name(self, name: str) -> str | None:
        return name.replace("model.word_embeddings.", "model.embed_tokens.")


def build(config: dict[str, Any], ctx: BuildContext, max_positions: int) -> Decoder:
    if config.get("norm_head"):
        raise ModelLoadError("norm_head: a head whose rows are normalised is not served")
    if config["score_function"] != "sigmoid":
        raise ModelLoadError(f"score_function: {config['score_function']!r} is not served; known: sigmoid")
    biased = bool(config["moe_router_enable_expert_bias"])
    router = RouterSpec(
        config["num_experts_per_tok"],
        "sigmoid",
        renormalise=bool(config["norm_topk_prob"]),
        eps=1e-20,
        scale=float(config["routed_scaling_factor"]),
        groups=config["n_group"],
        keep=config["topk_group"],
    )
    inner, names = config["moe_intermediate_size"], ExpertNames(correction="gate.expert_bias" if biased else "")
    beside = int(config["num_shared_experts"] or 0)
    shared = usual_mlp(config, inner_size=inner * beside, name="shared_experts") if beside else None
    experts = Experts(ExpertsConfig(config["num_experts"], inner, router, names=names), shared=shared)
    attention = usual_attention(
        config,
        name="attention", block=config["block_size"], fused="query_key_value", o_proj="dense",
        qk_norm="head" if config["use_qk_norm"] else "", q_norm="query_layernorm", k_norm="key_layernorm",
        qkv_bias=bool(config.get("use_qkv_bias", False)), out_bias=bool(config.get("use_bias", False)),
    )  # fmt: skip

    def layer(n: int) -> LayerKind:
        return LayerKind(attention, usual_mlp(config) if n < config["first_k_dense_replace"] else experts)

    return LLaDA2(ctx, usual(config, layers=each_layer(config, layer)), max_positions)
