"""Granite 4.0: Granite with Mamba 2 in most layers of its H models, and experts beside a dense block or that alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from phloem.core.errors import ModelLoadError
from phloem.layers.moe import SharedExperts
from phloem.layers.recurrent import Mamba2
from phloem.models._common import each_layer, usual_attention
from phloem.models._layer import MLP, LayerKind, Recurrent
from phloem.models.bamba import mamba_sizes
from phloem.models.granite import multiplied
from phloem.models.granitemoe import chosen

if TYPE_CHECKING:
    from phloem.layers.context import BuildContext
    from phloem.models._common import Decoder
    from phloem.models._layer import Experts, MakeFeed, Place

DEFAULTS = {
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "shared_intermediate_size": 1024,
    "mamba_n_heads": 128,
    "mamba_n_groups": 1,
    "mamba_d_state": 256,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_conv_bias": True,
    "mamba_proj_bias": False,
}
GGUF = {
    "architecture": "granitehybrid",
    "hf_class": "GraniteMoeHybridForCausalLM",
    "keys": {
        "num_local_experts": ("expert_count", 0),
        "num_experts_per_tok": ("expert_used_count", 0),
        "shared_intermediate_size": ("expert_shared_feed_forward_length", 0),
        "embedding_multiplier": "embedding_scale",
        "residual_multiplier": "residual_scale",
        "attention_multiplier": "attention.scale",
        "logits_scaling": "logit_scale",
        "rotated": ("rope.scaling.finetuned", False),
        "mamba_d_ssm": "ssm.inner_size",
        "mamba_n_heads": "ssm.time_step_rank",
        "mamba_n_groups": "ssm.group_count",
        "mamba_d_state": "ssm.state_size",
        "mamba_d_conv": "ssm.conv_kernel",
    },
    "config": {"projections_apart": True},
    "flags": {"mamba_conv_bias": "ssm_conv1d.bias", "mamba_proj_bias": "ssm_in.bias"},
    "kinds": {"layer_types": {"ssm_in.weight": "mamba", "attn_q.weight": "attention"}},
    "shares": {"mamba_d_head": ("ssm.inner_size", "ssm.time_step_rank")},
    "names": {
        "block_sparse_moe.router.layer": "ffn_gate_inp",
        "block_sparse_moe.experts.{}.gate_proj": "ffn_gate_exps",
        "block_sparse_moe.experts.{}.up_proj": "ffn_up_exps",
        "block_sparse_moe.experts.{}.down_proj": "ffn_down_exps",
        "shared_mlp.gate_proj": "ffn_gate_shexp",
        "shared_mlp.up_proj": "ffn_up_shexp",
        "shared_mlp.output_linear": "ffn_down_shexp",
        "dense_mlp.gate_proj": "ffn_gate",
        "dense_mlp.up_proj": "ffn_up",
        "dense_mlp.output_linear": "ffn_down",
    },
    "turned": ("q_proj", "k_proj"),
}
TINY = {
    "head_dim": None,
    "position_embedding_type": "rope",
    "num_local_experts": 6,
    "num_experts_per_tok": 2,
    "intermediate_size": 24,
    "shared_intermediate_size": 40,
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.3,
    "logits_scaling": 0.25,
    "mamba_n_heads": 8,
    "mamba_d_state": 8,
    "mamba_chunk_size": 8,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}
VARIANTS = {
    "still": {"position_embedding_type": None, "mamba_n_groups": 2, "tie_word_embeddings": True},
    "dense": {"num_local_experts": 0, "num_experts_per_tok": 0, "layer_types": ["attention", "attention", "mamba"]},
}

_KINDS = {"mamba": False, "linear_attention": False, "attention": True, "full_attention": True}


@dataclass(frozen=True)
class Beside:
    """Makes a sparse block and a dense one that lie side by side in the layer."""

    sparse: Experts
    dense: MLP

    def __call__(self, ctx: BuildContext, place: Place) -> SharedExperts:
        return SharedExperts(ctx, place.hidden_size, self.sparse.sparse(ctx, place), self.dense(ctx, place))


def attends(config: dict[str, Any]) -> list[bool]:
    """Which layers attend; the others are recurrent. Raises ModelLoadError for kinds that are not known."""
    count = config["num_hidden_layers"]
    kinds = config.get("layer_types") or config.get("layers_block_type") or ["mamba"] * count
    unknown = sorted(set(kinds) - set(_KINDS))
    if unknown or len(kinds) != count:
        raise ModelLoadError(f"layer_types: {len(kinds)} entries for {count} layers, unknown: {unknown}")
    return [_KINDS[kind] for kind in kinds]


def build(config: dict[str, Any], ctx: BuildContext, max_positions: int) -> Decoder:
    turns = config.get("rotated", config.get("position_embedding_type") == "rope")
    rope = {} if turns else {"rope": None}
    scale = float(config.get("attention_multiplier", 1.0))
    attention, full = usual_attention(config, scale=scale, **rope), attends(config)
    mamba = Recurrent(Mamba2, mamba_sizes(config), "mamba")
    activation = config.get("hidden_act", "silu")
    apart, experts = bool(config.get("projections_apart")), bool(config["num_local_experts"])
    fused = "" if apart else "input_linear"
    # GGUF files without experts call the block by another name, and its size too.
    name = "dense_mlp" if apart and not experts else "shared_mlp"
    inner = config["intermediate_size"] if name == "dense_mlp" else config["shared_intermediate_size"]
    dense = MLP(inner, activation, fused=fused, name=name, down="output_linear")
    feed: MakeFeed = Beside(chosen(config), dense) if experts else dense
    residual = float(config.get("residual_multiplier", 1.0))

    def layer(n: int) -> LayerKind:
        return LayerKind(attention if full[n] else mamba, feed, residual_scale=residual)

    return multiplied(config, ctx, max_positions, each_layer(config, layer))
