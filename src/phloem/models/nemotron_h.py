"""Nemotron H and Nemotron 3: one block per layer behind one norm: Mamba 2, attention without rotation, MLP or experts.

Experts and MLPs are two matrices with a squared ReLU. Steps of Mamba 2 are not bounded from below: the bound in
config.json is of training.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from phloem.core.errors import ModelLoadError
from phloem.kernels.specs import ExpertSpec
from phloem.layers.moe import ExpertNames, ExpertsConfig
from phloem.layers.recurrent import Mamba2, MambaSizes
from phloem.models._common import Decoder, renamed, usual, usual_attention
from phloem.models._layer import Experts, LayerKind, Plain, Recurrent
from phloem.models.deepseek_v3 import grouped_router

if TYPE_CHECKING:
    from phloem.layers.context import BuildContext

DEFAULTS = {
    "layer_norm_epsilon": 1e-5,
    "head_dim": 128,
    "conv_kernel": 4,
    "n_groups": 8,
    "use_bias": False,
    "use_conv_bias": True,
    "mlp_bias": False,
    "mlp_hidden_act": "relu2",
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
}
NEEDS = ("vocab_size", "hidden_size", "num_attention_heads", "mamba_num_heads")
GGUF = {
    "architecture": "nemotron_h",
    "also": ("nemotron_h_moe",),
    "hf_class": "NemotronHForCausalLM",
    "keys": {
        "layer_norm_epsilon": "attention.layer_norm_rms_epsilon",
        "mamba_num_heads": "ssm.time_step_rank",
        "n_groups": "ssm.group_count",
        "ssm_state_size": "ssm.state_size",
        "conv_kernel": "ssm.conv_kernel",
        "n_routed_experts": ("expert_count", 0),
        "num_experts_per_tok": ("expert_used_count", 0),
        "moe_intermediate_size": ("expert_feed_forward_length", 0),
        "moe_shared_expert_intermediate_size": ("expert_shared_feed_forward_length", 0),
        "n_shared_experts": ("expert_shared_count", 1),
        "routed_scaling_factor": ("expert_weights_scale", 1.0),
        "norm_topk_prob": ("expert_weights_norm", False),
        "n_group": ("expert_group_count", 1),
        "topk_group": ("expert_group_used_count", 1),
        "moe_latent_size": ("moe_latent_size", 0),
        "num_nextn_predict_layers": ("nextn_predict_layers", 0),
    },
    "config": {"mlp_hidden_act": "relu2"},
    "flags": {"use_bias": "ssm_in.bias", "use_conv_bias": "ssm_conv1d.bias", "mlp_bias": "ffn_up.bias"},
    "kinds": {
        "layers_block_type": {
            "ssm_in.weight": "linear_attention",
            "attn_q.weight": "full_attention",
            "ffn_gate_inp.weight": "moe",
            "ffn_up.weight": "mlp",
        }
    },
    "shares": {"mamba_head_dim": ("ssm.inner_size", "ssm.time_step_rank")},
    "names": {
        "norm": "attn_norm",
        "mixer.q_proj": "attn_q",
        "mixer.k_proj": "attn_k",
        "mixer.v_proj": "attn_v",
        "mixer.o_proj": "attn_output",
        "mixer.up_proj": "ffn_up",
        "mixer.down_proj": "ffn_down",
        "mixer.gate": "ffn_gate_inp",
        "mixer.gate.e_score_correction_bias": "exp_probs_b.bias",
        "mixer.experts.{}.up_proj": "ffn_up_exps",
        "mixer.experts.{}.down_proj": "ffn_down_exps",
        "mixer.shared_experts.up_proj": "ffn_up_shexp",
        "mixer.shared_experts.down_proj": "ffn_down_shexp",
        "mixer.fc1_latent_proj": "ffn_latent_down",
        "mixer.fc2_latent_proj": "ffn_latent_up",
    },
}
TINY = {
    "num_hidden_layers": 5,
    "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp", "linear_attention"],
    "ssm_state_size": 8,
    "mamba_num_heads": 6,
    "mamba_head_dim": 4,
    "n_groups": 2,
    "chunk_size": 8,
    "time_step_min": 1e-9,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 40,
    "routed_scaling_factor": 2.5,
}
VARIANTS = {
    "bias": {"use_bias": True, "mlp_bias": True, "n_groups": 1, "n_group": 4, "topk_group": 2},
    "latent": {"moe_latent_size": 20},
}

_KINDS = {
    "M": "linear_attention",
    "mamba": "linear_attention",
    "E": "moe",
    "*": "full_attention",
    "attention": "full_attention",
    "-": "mlp",
}
_NAMES = ExpertNames(correction="gate.e_score_correction_bias")
_RENAMED = {
    "backbone.embeddings.": "model.embed_tokens.",
    "model.embeddings.": "model.embed_tokens.",
    "backbone.": "model.",
}


class NemotronH(Decoder):
    """A decoder whose files have other names, and perhaps a block that drafts and is not used here."""

    def checkpoint_name(self, name: str) -> str | None:
        return None if name.startswith("mtp.") else renamed(name, _RENAMED) or name


def kinds(config: dict[str, Any]) -> list[str]:
    """What each layer is, by the names of today's config.json. Raises ModelLoadError for others."""
    keys = ("layers_block_type", "layer_types", "hybrid_override_pattern")
    listed: list[str] | str = next((config[key] for key in keys if config.get(key)), "")
    if not listed:
        raise ModelLoadError("neither layers_block_type nor hybrid_override_pattern says what the layers are")
    found = [_KINDS.get(kind, kind) for kind in listed]
    unknown = sorted(set(found) - {"linear_attention", "full_attention", "mlp", "moe"})
    if unknown:
        raise ModelLoadError(f"layers_block_type: unknown: {', '.join(unknown)}")
    return found


def _experts(config: dict[str, Any]) -> Experts:
    count = config["n_routed_experts"]
    spec = ExpertSpec(count, "relu2", gated=False)
    latent = int(config.get("moe_latent_size") or 0), bool(config["mlp_bias"])
    sizes = count, config["moe_intermediate_size"]
    sparse = ExpertsConfig(*sizes, grouped_router(config), spec, False, _NAMES, *latent)
    inner = config["moe_shared_expert_intermediate_size"]
    shared = Plain(inner, config["mlp_hidden_act"], bool(config["mlp_bias"]), name="shared_experts")
    return Experts(sparse, "mixer", shared=shared)


def build(config: dict[str, Any], ctx: BuildContext, max_positions: int) -> Decoder:
    eps, bias = float(config["layer_norm_epsilon"]), bool(config["mlp_bias"])
    found = kinds(config)
    sizes = MambaSizes(
        config["mamba_num_heads"],
        config["mamba_head_dim"],
        config["n_groups"],
        config["ssm_state_size"],
        config["conv_kernel"],
        eps,
        bool(config["use_bias"]),
        bool(config["use_conv_bias"]),
    )
    attention = usual_attention(config, rope=None, name="mixer", qkv_bias=False, out_bias=False)
    made = {
        "linear_attention": LayerKind(Recurrent(Mamba2, sizes, "mixer"), None, "alone"),
        "full_attention": LayerKind(attention, None, "alone"),
    }
    if "mlp" in found and not config.get("intermediate_size"):
        raise ModelLoadError("nothing says how wide the layers of two matrices are (intermediate_size)")
    if "mlp" in found:
        feed = Plain(config["intermediate_size"], config["mlp_hidden_act"], bias, name="mixer")
        made["mlp"] = LayerKind(None, feed, "alone")
    if "moe" in found:
        made["moe"] = LayerKind(None, _experts(config), "alone")
    config_of_all = usual(config, layers=tuple(made[kind] for kind in found), eps=eps, norm_name="norm_f")
    return NemotronH(ctx, config_of_all, max_positions)
