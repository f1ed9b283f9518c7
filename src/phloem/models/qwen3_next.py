"""Qwen3-Next: gated delta nets, gated attention in every fourth layer, experts beside a gated dense block."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from phloem.core.errors import ModelLoadError
from phloem.layers.moe import softmax_experts
from phloem.layers.recurrent import DeltaSizes, GatedDelta
from phloem.models._common import Decoder, each_layer, usual, usual_attention, usual_mlp
from phloem.models._layer import Experts, LayerKind, Recurrent

if TYPE_CHECKING:
    from collections.abc import Callable

    from phloem.layers.context import BuildContext
    from phloem.models._layer import MakeFeed

DEFAULTS = {
    "head_dim": 256,
    "partial_rotary_factor": 0.25,
    "full_attention_interval": 4,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "decoder_sparse_step": 1,
    "norm_topk_prob": True,
}
# Value heads stand one behind the other where q, k and v have a tensor of their own.
GGUF = {
    "architecture": "qwen3next",
    "hf_class": "Qwen3NextForCausalLM",
    "keys": {
        "linear_key_head_dim": "ssm.state_size",
        "linear_num_key_heads": "ssm.group_count",
        "linear_num_value_heads": "ssm.time_step_rank",
        "linear_conv_kernel_dim": "ssm.conv_kernel",
        "full_attention_interval": ("full_attention_interval", 4),
        "num_experts": "expert_count",
        "num_experts_per_tok": "expert_used_count",
        "moe_intermediate_size": "expert_feed_forward_length",
        "shared_expert_intermediate_size": "expert_shared_feed_forward_length",
        "norm_topk_prob": ("expert_weights_norm", True),
    },
    "config": {"decoder_sparse_step": 1, "partial_rotary_factor": 1.0},
    "flags": {"gates_apart": "attn_gate.weight"},
    "kinds": {"layer_types": {"ssm_out.weight": "linear_attention", "attn_q.weight": "full_attention"}},
    "shares": {"linear_value_head_dim": ("ssm.inner_size", "ssm.time_step_rank")},
    "names": {
        "post_attention_layernorm": "post_attention_norm",
        "linear_attn.in_proj_qkvz": "ssm_in",
        "linear_attn.in_proj_qkv": "attn_qkv",
        "linear_attn.in_proj_z": "attn_gate",
        "linear_attn.in_proj_ba": "ssm_ba",
        "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
        "mlp.shared_expert.up_proj": "ffn_up_shexp",
        "mlp.shared_expert.down_proj": "ffn_down_shexp",
        "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    },
    "unheeded": ("rope.dimension_sections", "attention.recurrent_layers"),  # tensors say which are
    "norm_shift": 1.0,
}
TINY = {
    "num_hidden_layers": 3,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 24,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 40,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}
VARIANTS = {
    "one-head-each": {"linear_num_value_heads": 2, "norm_topk_prob": False, "tie_word_embeddings": True},
    "mixed": {"mlp_only_layers": [0], "layer_types": None, "num_hidden_layers": 4},
}


class Qwen3Next(Decoder):
    """A decoder whose files may hold a block that drafts and is not used here."""

    def checkpoint_name(self, name: str) -> str | None:
        return None if name.startswith(("mtp.", "model.mtp.")) else super().checkpoint_name(name)


def attends(config: dict[str, Any]) -> list[bool]:
    """Which layers attend; the others are recurrent. Raises ModelLoadError for kinds that are not known."""
    kinds, every = config.get("layer_types"), int(config["full_attention_interval"])
    if not kinds:
        return [(number + 1) % every == 0 for number in range(config["num_hidden_layers"])]
    unknown = sorted(set(kinds) - {"linear_attention", "full_attention"})
    if unknown or len(kinds) != config["num_hidden_layers"]:
        raise ModelLoadError(f"layer_types: {len(kinds)} entries, unknown: {unknown}")
    return [kind == "full_attention" for kind in kinds]


def hybrid(
    config: dict[str, Any], ctx: BuildContext, max_positions: int, feed: Callable[[int], MakeFeed], *, grouped: bool
) -> Decoder:
    """`feed`: the block of a layer. `grouped`: as `DeltaSizes`."""
    sizes = DeltaSizes(
        config["linear_num_key_heads"],
        config["linear_num_value_heads"],
        config["linear_key_head_dim"],
        config["linear_value_head_dim"],
        config["linear_conv_kernel_dim"],
        float(config.get("rms_norm_eps", 1e-6)),
        grouped,
        apart=bool(config.get("gates_apart")),
        tiled=bool(config.get("tiled_values")),
    )
    attention = usual_attention(config, qk_norm="head", gate=True, norm_shift=1.0)
    delta, full = Recurrent(GatedDelta, sizes, "linear_attn"), attends(config)

    def layer(n: int) -> LayerKind:
        return LayerKind(attention if full[n] else delta, feed(n))

    return Qwen3Next(ctx, usual(config, layers=each_layer(config, layer), norm_shift=1.0), max_positions)


def experts(config: dict[str, Any]) -> Experts:
    """The sparse block, beside a dense one behind a gate."""
    sizes = config["num_experts"], config["num_experts_per_tok"], config["moe_intermediate_size"]
    sparse = softmax_experts(*sizes, config.get("hidden_act", "silu"), bool(config["norm_topk_prob"]))
    shared = usual_mlp(config, inner_size=config["shared_expert_intermediate_size"], name="shared_expert")
    return Experts(sparse, shared=shared, shared_gate="shared_expert_gate")


def build(config: dict[str, Any], ctx: BuildContext, max_positions: int) -> Decoder:
    sparse, step, dense = experts(config), int(config["decoder_sparse_step"]), config.get("mlp_only_layers") or ()

    def feed(n: int) -> MakeFeed:
        return usual_mlp(config) if n in dense or (n + 1) % step else sparse

    return hybrid(config, ctx, max_positions, feed, grouped=True)
