"""Kimi Linear: delta nets that forget by channel, latent attention without positions, DeepSeek V3's experts."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from phloem.core.errors import ModelLoadError
from phloem.layers.kimi_delta import KimiDelta, KimiDeltaSizes
from phloem.layers.moe import ExpertNames, ExpertsConfig
from phloem.models._common import Decoder, Trunk, each_layer, usual, usual_mlp
from phloem.models._layer import Experts, Latents, LayerKind, Recurrent
from phloem.models.deepseek_v3 import grouped_router, latent_sizes

if TYPE_CHECKING:
    from phloem.layers.context import BuildContext

DEFAULTS = {
    "max_position_embeddings": 1048576,
    "norm_topk_prob": True,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "n_shared_experts": 1,
    "routed_scaling_factor": 2.446,
}
SPELLING = {
    "max_position_embeddings": "model_max_length",
    "norm_topk_prob": "moe_renormalize",
    "n_group": "num_expert_group",
    "num_experts_per_tok": "num_experts_per_token",
    "n_shared_experts": "num_shared_experts",
}
GGUF = {
    "architecture": "kimi-linear",
    "hf_class": "KimiLinearForCausalLM",
    "keys": {
        "q_lora_rank": ("attention.q_lora_rank", 0),
        "kv_lora_rank": "attention.kv_lora_rank",
        "qk_rope_head_dim": "rope.dimension_count",
        "head_dim": "rope.dimension_count",
        "linear_head_dim": "kda.head_dim",
        "linear_num_heads": "attention.head_count",
        "linear_conv_kernel_dim": "ssm.conv_kernel",
        "num_experts": "expert_count",
        "num_experts_per_tok": "expert_used_count",
        "n_shared_experts": "expert_shared_count",
        "moe_intermediate_size": "expert_feed_forward_length",
        "first_k_dense_replace": "leading_dense_block_count",
        "routed_scaling_factor": ("expert_weights_scale", 1.0),
        "norm_topk_prob": ("expert_weights_norm", True),
        "n_group": ("expert_group_count", 1),
        "topk_group": ("expert_group_used_count", 1),
        "scoring_func": ("expert_gating_func", 2),
    },
    "config": {"moe_layer_freq": 1},
    "kinds": {"layer_types": {"ssm_a": "linear_attention", "attn_kv_a_mqa.weight": "full_attention"}},
    "names": {
        "self_attn.q_a_proj": "attn_q_a",
        "self_attn.q_a_layernorm": "attn_q_a_norm",
        "self_attn.q_b_proj": "attn_q_b",
        "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
        "self_attn.kv_a_layernorm": "attn_kv_a_norm",
        "self_attn.kv_b_proj": "attn_kv_b",
        "self_attn.q_conv1d": "ssm_conv1d_q",
        "self_attn.k_conv1d": "ssm_conv1d_k",
        "self_attn.v_conv1d": "ssm_conv1d_v",
        "self_attn.f_a_proj": "ssm_f_a",
        "self_attn.f_b_proj": "ssm_f_b",
        "self_attn.g_a_proj": "ssm_g_a",
        "self_attn.g_b_proj": "ssm_g_b",
        "self_attn.b_proj": "ssm_beta",
        "self_attn.o_norm": "ssm_norm",
        "block_sparse_moe.gate": "ffn_gate_inp",
        "block_sparse_moe.gate.e_score_correction_bias": "exp_probs_b.bias",
        "block_sparse_moe.experts.{}.w1": "ffn_gate_exps",
        "block_sparse_moe.experts.{}.w3": "ffn_up_exps",
        "block_sparse_moe.experts.{}.w2": "ffn_down_exps",
        "block_sparse_moe.shared_experts.gate_proj": "ffn_gate_shexp",
        "block_sparse_moe.shared_experts.up_proj": "ffn_up_shexp",
        "block_sparse_moe.shared_experts.down_proj": "ffn_down_shexp",
    },
}
TINY = {
    "head_dim": None,
    "num_key_value_heads": 4,
    "q_lora_rank": None,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "linear_head_dim": 12,
    "linear_num_heads": 4,
    "linear_conv_kernel_dim": 4,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}
VARIANTS = {
    "groups": {"n_group": 4, "topk_group": 2, "q_lora_rank": 24, "linear_conv_kernel_dim": 3},
    "dense": {"mlp_layer_types": ["dense", "dense", "sparse"], "layer_types": None, "n_shared_experts": 2},
}

_NAMES = ExpertNames(
    gate="experts.{}.w1.weight",
    up="experts.{}.w3.weight",
    down="experts.{}.w2.weight",
    correction="gate.e_score_correction_bias",
)
_DENSE = re.compile(r"(\.layers\.\d+\.)block_sparse_moe\.((?:gate|up|down)_proj\.)")


class KimiLinear(Trunk):
    """A decoder of whose dense layers transformers writes other names than the published files have."""

    def checkpoint_name(self, name: str) -> str | None:
        return super().checkpoint_name(_DENSE.sub(r"\1mlp.\2", name))


def _kinds(config: dict[str, Any], key: str, *known: str) -> list[str]:
    """A setting that names the kind of each layer."""
    kinds, count = config[key], config["num_hidden_layers"]
    if not isinstance(kinds, list):
        raise ModelLoadError(f"{key} is {kinds!r:.60}: expected a list")
    unknown = [kind for kind in kinds if kind not in known]
    if unknown or len(kinds) != count:
        raise ModelLoadError(f"{key}: {len(kinds)} entries, expected {count}; unknown: {unknown!r:.100}")
    return kinds


def _listed(config: dict[str, Any]) -> dict[str, Any]:
    listed = config.get("linear_attn_config") or {}
    if not isinstance(listed, dict):
        raise ModelLoadError(f"linear_attn_config is {listed!r:.60}: expected an object")
    return listed


def _size(listed: dict[str, Any], config: dict[str, Any], key: str, other: str, usual: int) -> int:
    """A size of the delta nets, by its name in `linear_attn_config` or that of transformers."""
    name = f"linear_attn_config.{key}" if key in listed else other
    value = listed.get(key, config.get(other, usual))
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ModelLoadError(f"{name} is {value!r:.60}: expected a whole number from 1 on")
    return value


def attends(config: dict[str, Any]) -> list[bool]:
    """Which layers attend: by `layer_types`, or `linear_attn_config`, which counts layers from 1. Raises
    ModelLoadError where these leave a layer out."""
    count, kinds = config["num_hidden_layers"], config.get("layer_types")
    if kinds:
        return [
            kind == "full_attention" for kind in _kinds(config, "layer_types", "linear_attention", "full_attention")
        ]
    listed = _listed(config)
    if "full_attn_layers" not in listed or "kda_layers" not in listed:
        return [number > 0 and number % 4 == 0 for number in range(count)]
    full, linear = listed["full_attn_layers"], listed["kda_layers"]
    if not isinstance(full, list) or not isinstance(linear, list):
        raise ModelLoadError(f"linear_attn_config: full_attn_layers {full!r:.40}, kda_layers {linear!r:.40}: no lists")
    rest = list(range(1, count + 1))
    if len(full) + len(linear) != count or any(number not in full + linear for number in rest):
        raise ModelLoadError(f"linear_attn_config: its two lists do not name each of layers 1 to {count} once")
    return [number + 1 in full for number in range(count)]


def _delta(config: dict[str, Any]) -> Recurrent[KimiDeltaSizes]:
    listed = _listed(config)
    sizes = KimiDeltaSizes(
        _size(listed, config, "num_heads", "linear_num_heads", 32),
        _size(listed, config, "head_dim", "linear_head_dim", 128),
        _size(listed, config, "short_conv_kernel_size", "linear_conv_kernel_dim", 4),
        float(config["rms_norm_eps"]),
    )
    return Recurrent(KimiDelta, sizes, "self_attn")


def _latents(config: dict[str, Any]) -> Latents:
    """DeepSeek's, of which nothing turns."""
    sizes = latent_sizes(config)
    return Latents(sizes, None, (sizes.nope + sizes.rope) ** -0.5)


def _experts(config: dict[str, Any]) -> Experts:
    inner = config["moe_intermediate_size"]
    sparse = ExpertsConfig(config["num_experts"], inner, grouped_router(config), names=_NAMES)
    count = int(config["n_shared_experts"] or 0)
    shared = usual_mlp(config, inner_size=inner * count, name="shared_experts") if count else None
    return Experts(sparse, "block_sparse_moe", shared=shared)


def build(config: dict[str, Any], ctx: BuildContext, max_positions: int) -> Decoder:
    if not config.get("mla_use_nope", True):
        raise ModelLoadError("mla_use_nope is false: no published model of the family turns its latent attention")
    score = config.get("moe_router_activation_func", "sigmoid")
    if score != "sigmoid" or config.get("scoring_func", 2) != 2:  # a number in GGUF files
        raise ModelLoadError(f"moe_router_activation_func {config.get('scoring_func', score)!r}: known is sigmoid")
    full, delta, latents, sparse = attends(config), _delta(config), _latents(config), _experts(config)
    first, every = config["first_k_dense_replace"], config["moe_layer_freq"]
    if not isinstance(first, int) or not isinstance(every, int) or every < 0:
        raise ModelLoadError(f"first_k_dense_replace {first!r:.40}, moe_layer_freq {every!r:.40}: no whole numbers")
    every = every or 1
    kinds = _kinds(config, "mlp_layer_types", "dense", "sparse") if config.get("mlp_layer_types") else None

    def layer(n: int) -> LayerKind:
        routed = kinds[n] == "sparse" if kinds else n >= first and n % every == 0
        return LayerKind(latents if full[n] else delta, sparse if routed else usual_mlp(config))

    return KimiLinear(ctx, usual(config, layers=each_layer(config, layer)), max_positions)
