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
GGUF = {
    "architecture": "jamba",
    "hf_class": "JambaForCausalLM",
    "keys": {
        "mamba_inner": "ssm.inner_size",
        "mamba_d_state": "ssm.state_size",
        "mamba_d_conv": "ssm.conv_kernel",
        "mamba_dt_rank": "ssm.time_step_rank",
        "num_experts": ("expert_count", 0),
        "num_experts_per_tok": ("expert_used_count", 0),
    },
    "flags": {"mamba_proj_bias": "ssm_in.bias", "mamba_conv_bias": "ssm_conv1d.bias"},
    "layers_with": {"attention_layers": "attn_q.weight", "sparse_layers": "ffn_gate_inp.weight"},
    "names": {
        "pre_ff_layernorm": "ffn_norm",
        "feed_forward.router": "ffn_gate_inp",
        "feed_forward.experts.{}.gate_proj": "ffn_gate_exps",
        "feed_forward.experts.{}.up_proj": "ffn_up_exps",
        "feed_forward.experts.{}.down_proj": "ffn_down_exps",
        "feed_forward.gate_proj": "ffn_gate",
        "feed_forward.up_proj": "ffn_up",
        "feed_forward.down_proj": "ffn_down",
    },
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


def _listed(config: dict[str, Any], key: str, name: str, numbers: range) -> list[int]:
    """Layers of a kind: listed (as for GGUF files), or every so many from one on."""
    period, offset = config.get(f"{name}_period", 1), config.get(f"{name}_offset", 0)
    return config[key] if key in config else [n for n in numbers if n % period == offset]


def build(config: dict[str, Any], ctx: BuildContext, max_positions: int) -> Decoder:
    eps, hidden = float(config.get("rms_norm_eps", 1e-6)), config["hidden_size"]
    sizes = SelectiveSizes(
        inner=config.get("mamba_inner") or config["mamba_expand"] * hidden,
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

    numbers = range(config["num_hidden_layers"])
    attending = _listed(config, "attention_layers", "attn_layer", numbers)
    sparse_ones = _listed(config, "sparse_layers", "expert_layer", numbers) if config["num_experts"] > 1 else []

    def layer(n: int) -> LayerKind:
        attends, expert = n in attending, n in sparse_ones
        names = ("input_layernorm", "pre_ff_layernorm")
        return LayerKind(attention if attends else mamba, experts if expert else dense, norm_names=names)

    config_of_all = usual(config, layers=each_layer(config, layer), norm_name="final_layernorm")
    return Decoder(ctx, config_of_all, max_positions)
