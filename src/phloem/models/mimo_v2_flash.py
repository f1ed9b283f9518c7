"""MiMo-V2-Flash: windows with sinks on five layers of six; values narrower than keys; experts."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from phloem.core.errors import ModelLoadError
from phloem.layers.rope import rope_spec
from phloem.models._common import Decoder, each_layer, layer_types, usual, usual_attention, usual_mlp
from phloem.models._layer import Attention, Experts, LayerKind
from phloem.models.deepseek_v3 import grouped_experts

if TYPE_CHECKING:
    from phloem.layers.context import BuildContext

IGNORED = (r"model\.mtp\..*",)
DEFAULTS = {
    "partial_rotary_factor": 0.334,
    "rope_theta": 5e6,
    "swa_rope_theta": 1e4,
    "sliding_window": 129,
    "attention_value_scale": 1.0,
    "norm_topk_prob": True,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
}
GGUF = {
    "architecture": "mimo2",
    "hf_class": "MiMoV2FlashForCausalLM",
    "keys": {
        "v_head_dim": "attention.value_length",
        "sliding_window": "attention.sliding_window",
        "layer_types": ("attention.sliding_window_pattern", None),
        "swa_rope_theta": ("rope.freq_base_swa", 10000.0),
        "attention_value_scale": ("attention.value_scale", 1.0),
        "n_routed_experts": "expert_count",
        "num_experts_per_tok": "expert_used_count",
        "moe_intermediate_size": "expert_feed_forward_length",
        "n_group": ("expert_group_count", 1),
        "topk_group": ("expert_group_used_count", 1),
        "num_nextn_predict_layers": ("nextn_predict_layers", 0),
    },
    # llama.cpp knows one way of weighting its experts.
    "config": {
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
        "num_key_value_heads": 1,
        "partial_rotary_factor": 1.0,
    },
    "lists": {"kv_heads": "attention.head_count_kv"},
    "flags": {"add_swa_attention_sink_bias": "attn_sinks.weight"},
    "kinds": {"mlp_layer_types": {"ffn_gate_inp.weight": "sparse", "ffn_gate.weight": "dense"}},
    "names": {
        "self_attn.attention_sink_bias": "attn_sinks.weight",
        "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
    },
    "unheeded": ("expert_gating_func",),
}
TINY = {
    "num_hidden_layers": 7,
    "head_dim": 24,
    "v_head_dim": 16,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "sliding_window": 6,
}
VARIANTS = {"bias": {"attention_bias": True, "attention_value_scale": 1.7, "num_key_value_heads": 1}}


def _gguf_heads(config: dict[str, Any]) -> dict[str, Any]:
    """Key heads of both kinds of layers by the names of config.json, from a GGUF file's number for each layer."""
    each = {
        (kind == "sliding_attention", kv) for kind, kv in zip(config["layer_types"], config["kv_heads"], strict=False)
    }
    heads = dict(each)
    if len(heads) != len(each) or any(not isinstance(kv, int) or kv < 1 for kv in heads.values()):
        raise ModelLoadError(f"attention.head_count_kv {config['kv_heads']!r:.100}: one number for each kind of layers")
    # A kind that no layer is of has any.
    names = {False: "num_key_value_heads", True: "swa_num_key_value_heads"}
    return {**config, **{names[local]: kv for local, kv in heads.items()}}


def _attention(config: dict[str, Any], local: bool) -> Attention:
    size, kv_heads = config["head_dim"], config["num_key_value_heads"]
    ropes = config.get("rope_parameters") or {}
    rope: dict[str, Any] = ropes.get("sliding_attention" if local else "full_attention") or {
        **ropes,
        "rope_theta": config["swa_rope_theta" if local else "rope_theta"],
    }
    share = rope.get("partial_rotary_factor", config["partial_rotary_factor"])
    made = usual_attention(
        config,
        rope=rope_spec({"rope_parameters": {**rope, "partial_rotary_factor": share}}, size),
        value_size=config["v_head_dim"],
        out_bias=False,
        value_scale=float(config["attention_value_scale"]),
    )
    if not local:
        return made
    # Beside the token itself, older files count the ones before it.
    window = config["sliding_window_size"] + 1 if "sliding_window_size" in config else config["sliding_window"]
    heads = config.get("swa_num_key_value_heads") or 2 * kv_heads
    sinks = "attention_sink_bias" if config.get("add_swa_attention_sink_bias", True) else ""
    return replace(made, kv_heads=heads, window=int(window), options=replace(made.options, sinks=sinks))


def build(config: dict[str, Any], ctx: BuildContext, max_positions: int) -> Decoder:
    config = _gguf_heads(config) if "kv_heads" in config else config
    count = config["num_hidden_layers"]
    pattern = config.get("hybrid_layer_pattern") or [n > 0 and (n + 1) % 6 != 0 for n in range(count)]
    sliding = layer_types(config, [bool(local) for local in pattern])
    kinds, listed = config.get("mlp_layer_types"), config.get("moe_layer_freq")
    found = grouped_experts({**config, "n_shared_experts": 1})
    experts = Experts(found.config)
    attentions = {local: _attention(config, local) for local in set(sliding)}

    def layer(n: int) -> LayerKind:
        sparse = kinds[n] == "sparse" if kinds else bool(listed[n]) if listed else n > 0
        return LayerKind(attentions[sliding[n]], experts if sparse else usual_mlp(config))

    return Decoder(ctx, usual(config, layers=each_layer(config, layer)), max_positions)
