"""Llama 4: most layers attend inside their chunk alone, the others everywhere and without rotation; experts.

A token's weight multiplies what its expert reads, and a dense expert is shared by all tokens.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from phloem.core.errors import ModelLoadError
from phloem.kernels.specs import ExpertSpec, RouterSpec
from phloem.layers.attention import QGrowth
from phloem.layers.moe import ExpertNames, ExpertsConfig
from phloem.layers.rope import rope_spec
from phloem.models._common import Decoder, each_layer, usual, usual_attention, usual_mlp
from phloem.models._layer import Experts, LayerKind

if TYPE_CHECKING:
    from phloem.layers.context import BuildContext

DEFAULTS = {
    "rope_theta": 500000.0,
    "head_dim": 128,
    "rms_norm_eps": 1e-5,
    "num_experts_per_tok": 1,
    "interleave_moe_layer_step": 1,
    "no_rope_layer_interval": 4,
    "use_qk_norm": True,
    "attention_chunk_size": 8192,
    "attn_temperature_tuning": True,
    "floor_scale": 8192,
    "attn_scale": 0.1,
}
# What the file does not say stands in llama.cpp: chunks of 8,192, of which 0 is none, and no norms beside 128 experts.
GGUF = {
    "architecture": "llama4",
    "hf_class": "Llama4ForCausalLM",
    "keys": {
        "intermediate_size_mlp": "feed_forward_length",
        "intermediate_size": "expert_feed_forward_length",
        "num_local_experts": "expert_count",
        "num_experts_per_tok": "expert_used_count",
        "interleave_moe_layer_step": "interleave_moe_layer_step",
        "attention_chunk_size": ("attention.sliding_window", 8192),
        "chunked_layers": ("attention.sliding_window_pattern", 4),
    },
    "config": {
        "projections_apart": True,
        "no_rope_layer_interval": 4,
        "attn_temperature_tuning": True,
        "floor_scale": 8192,
        "attn_scale": 0.1,
    },
    "layers_with": {"moe_layers": "ffn_gate_inp.weight"},
    "names": {
        "feed_forward.router": "ffn_gate_inp",
        "feed_forward.experts.{}.gate_proj": "ffn_gate_exps",
        "feed_forward.experts.{}.up_proj": "ffn_up_exps",
        "feed_forward.experts.{}.down_proj": "ffn_down_exps",
        "feed_forward.shared_expert.gate_proj": "ffn_gate_shexp",
        "feed_forward.shared_expert.up_proj": "ffn_up_shexp",
        "feed_forward.shared_expert.down_proj": "ffn_down_shexp",
        "feed_forward.gate_proj": "ffn_gate",
        "feed_forward.up_proj": "ffn_up",
        "feed_forward.down_proj": "ffn_down",
    },
}
TINY = {
    "num_hidden_layers": 4,
    "num_local_experts": 5,
    "intermediate_size": 24,
    "intermediate_size_mlp": 40,
    "interleave_moe_layer_step": 2,
    "attention_chunk_size": 8,
    "floor_scale": 6,
    "attn_scale": 0.4,
}
VARIANTS = {
    "plain": {"use_qk_norm": False, "attn_temperature_tuning": False, "interleave_moe_layer_step": 1},
    "two-experts": {"num_experts_per_tok": 2, "no_rope_layers": [0, 1, 1, 0], "moe_layers": [1, 2]},
}

_NAMES = ExpertNames(
    router="router",
    gate="experts.gate_up_proj",
    up="experts.gate_up_proj",
    down="experts.down_proj",
    transposed=True,
)


_APART = ExpertNames(router="router")  # in GGUF files


def chunks(config: dict[str, Any], turns: list[int]) -> list[bool]:
    """Which layers attend inside their chunk: those that turn, unless `layer_types` says otherwise."""
    kinds, every = config.get("layer_types"), config.get("chunked_layers")
    if not kinds:
        return (
            [not every or (n + 1) % every != 0 for n in range(len(turns))]
            if "chunked_layers" in config
            else [bool(turn) for turn in turns]
        )
    unknown = sorted(set(kinds) - {"chunked_attention", "full_attention"})
    if unknown or len(kinds) != len(turns):
        raise ModelLoadError(f"layer_types: {len(kinds)} entries for {len(turns)} layers, unknown: {unknown}")
    return [kind == "chunked_attention" for kind in kinds]


def build(config: dict[str, Any], ctx: BuildContext, max_positions: int) -> Decoder:
    count, every = config["num_hidden_layers"], int(config["no_rope_layer_interval"])
    turns = config.get("no_rope_layers") or [int((number + 1) % every != 0) for number in range(count)]
    apart, experts = bool(config.get("projections_apart")), config["num_local_experts"]
    if apart and not config["attention_chunk_size"]:
        turns = [1] * count
    step = int(config["interleave_moe_layer_step"])
    sparse_layers = config.get("moe_layers")
    sparse_layers = list(range(step - 1, count, step)) if sparse_layers is None else sparse_layers
    growth = QGrowth(float(config["attn_scale"]), int(config["floor_scale"]), 1)
    turning = usual_attention(
        config,
        rope=rope_spec(config, config["head_dim"], interleaved=True),
        qk_norm="unit" if config.get("use_qk_norm", experts != 128) else "",
    )
    still = usual_attention(config, rope=None, q_growth=growth if config["attn_temperature_tuning"] else None)
    length, chunked = int(config["attention_chunk_size"] or 0), chunks(config, turns)
    sparse = Experts(
        ExpertsConfig(
            experts,
            config["intermediate_size"],
            RouterSpec(config["num_experts_per_tok"], "chosen_sigmoid"),
            ExpertSpec(experts, scale_input=True),
            names=_APART if apart else _NAMES,
        ),
        "feed_forward",
        shared=usual_mlp(config, name="shared_expert"),
    )
    dense = usual_mlp(config, inner_size=config["intermediate_size_mlp"], name="feed_forward")

    def layer(n: int) -> LayerKind:
        attention = replace(turning if turns[n] else still, chunk=length if chunked[n] else 0)
        return LayerKind(attention, sparse if n in sparse_layers else dense)

    return Decoder(ctx, usual(config, layers=each_layer(config, layer)), max_positions)
