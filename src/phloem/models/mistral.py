"""Mistral: Llama with a sliding window over every layer, where the checkpoint has one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from phloem.layers.rope import rope_spec
from phloem.models._common import Decoder, each_layer, layer_types, usual, usual_layer

if TYPE_CHECKING:
    from phloem.layers.context import BuildContext

GGUF = {
    "architecture": "mistral",
    "hf_class": "MistralForCausalLM",
    "written_as": "llama",
    "keys": {"sliding_window": ("attention.sliding_window", None)},
}
TINY = {"sliding_window": 12}
VARIANTS = {"no-window": {"sliding_window": None}}


def build(config: dict[str, Any], ctx: BuildContext, max_positions: int) -> Decoder:
    window = int(config.get("sliding_window") or 0)
    # In Mistral's own format (`params.json`) neighbours are paired.
    size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    rope = rope_spec(config, size, interleaved=bool(config.get("rope_interleave")))
    sliding = layer_types(config, [bool(window)] * config["num_hidden_layers"])
    layers = each_layer(config, lambda n: usual_layer(config, rope=rope, window=window if sliding[n] else 0))
    return Decoder(ctx, usual(config, layers=layers), max_positions)
