"""Ministral 3: Llama whose queries grow with their position beyond the length that the model began with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from phloem.layers.attention import QGrowth
from phloem.layers.rope import rope_spec
from phloem.models._common import Decoder, DecoderConfig, each_layer, layer_types, usual, usual_layer

if TYPE_CHECKING:
    from phloem.layers.context import BuildContext

DEFAULTS = {"head_dim": 128}
GGUF = {
    "architecture": "mistral3",
    "hf_class": "Ministral3ForCausalLM",
    "keys": {
        "llama_4_scaling_beta": ("attention.temperature_scale", 0.0),
        "yarn_growth": ("rope.scaling.yarn_log_multiplier", 0.0),
        "sliding_window": ("attention.sliding_window", 0),
    },
    "turned": ("q_proj", "k_proj"),
}
TINY = {
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 1000000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 8,
        "llama_4_scaling_beta": 0.5,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    }
}
VARIANTS = {"window": {"sliding_window": 7}}


def decoder_config(config: dict[str, Any]) -> DecoderConfig:
    """What config.json describes."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    beta = config.get("llama_4_scaling_beta") or rope.get("llama_4_scaling_beta")
    length = rope.get("original_max_position_embeddings")
    if config.get("yarn_growth") and rope.get("rope_type") == "yarn":  # GGUF
        grown = dict.fromkeys(("mscale", "mscale_all_dim"), config["yarn_growth"])
        config = {**config, "rope_parameters": {**rope, **grown}}
    growth = QGrowth(float(beta), int(length)) if beta and length else None
    window = int(config.get("sliding_window") or 0)
    # In Mistral's own format (`params.json`) neighbours are paired.
    size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    rope = rope_spec(config, size, interleaved=bool(config.get("rope_interleave")))
    sliding = layer_types(config, [bool(window)] * config["num_hidden_layers"])

    def layer(n: int) -> Any:
        return usual_layer(config, rope=rope, window=window if sliding[n] else 0, q_growth=growth)

    return usual(config, layers=each_layer(config, layer))


def build(config: dict[str, Any], ctx: BuildContext, max_positions: int) -> Decoder:
    return Decoder(ctx, decoder_config(config), max_positions)
