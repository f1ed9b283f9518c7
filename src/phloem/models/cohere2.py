"""Command R7B and A: Command R with windows on three layers of four; the global ones do not rotate."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from phloem.layers.rope import rope_spec
from phloem.models._common import Decoder, each_layer, layer_types, usual, usual_attention, usual_mlp
from phloem.models._layer import LayerKind

if TYPE_CHECKING:
    from phloem.layers.context import BuildContext

DEFAULTS = {"logit_scale": 0.0625, "tie_word_embeddings": True, "layer_norm_eps": 1e-5}
GGUF = {
    "architecture": "cohere2",
    "hf_class": "Cohere2ForCausalLM",
    "keys": {
        "layer_norm_eps": "attention.layer_norm_epsilon",
        "logit_scale": "logit_scale",
        "sliding_window": "attention.sliding_window",
        "layer_types": ("attention.sliding_window_pattern", None),
    },
}
TINY = {"head_dim": None, "logit_scale": 0.5, "num_hidden_layers": 4, "sliding_window": 6}
VARIANTS = {"bias": {"attention_bias": True}}


def build(config: dict[str, Any], ctx: BuildContext, max_positions: int) -> Decoder:
    count, window = config["num_hidden_layers"], int(config.get("sliding_window") or 0)
    every = int(config.get("sliding_window_pattern") or 4)
    sliding = layer_types(config, [bool((number + 1) % every) for number in range(count)])
    head_size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    turning = rope_spec(config, head_size, interleaved=True)

    def layer(n: int) -> LayerKind:
        rope, size = (turning, window) if sliding[n] else (None, 0)
        return LayerKind(usual_attention(config, rope=rope, window=size), usual_mlp(config), norms="parallel")

    config_of_all = usual(
        config,
        layers=each_layer(config, layer),
        eps=float(config["layer_norm_eps"]),
        tied=bool(config.get("tie_word_embeddings", True)),
        norms="layer-without-bias",
        logit_scale=float(config.get("logit_scale") or 1.0),
    )
    return Decoder(ctx, config_of_all, max_positions)
