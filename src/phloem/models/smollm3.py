"""SmolLM3: Llama, of whose layers every fourth has no rotation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from phloem.models._common import Decoder, each_layer, layer_types, usual, usual_layer

if TYPE_CHECKING:
    from phloem.layers.context import BuildContext

DEFAULTS = {"rope_theta": 2e6, "tie_word_embeddings": True}
GGUF = {
    "architecture": "smollm3",
    "hf_class": "SmolLM3ForCausalLM",
    "turned": ("q_proj", "k_proj"),
}
TINY = {"head_dim": None, "num_hidden_layers": 5}
VARIANTS = {
    "window": {"use_sliding_window": True, "sliding_window": 7},
    "own-list": {"no_rope_layers": [0, 1, 1, 0, 1], "tie_word_embeddings": False},
}


def build(config: dict[str, Any], ctx: BuildContext, max_positions: int) -> Decoder:
    count, every = config["num_hidden_layers"], int(config.get("no_rope_layer_interval") or 4)
    turns = config.get("no_rope_layers") or [int((number + 1) % every != 0) for number in range(count)]
    windowed = bool(config.get("use_sliding_window")) and bool(config.get("sliding_window"))
    sliding = layer_types(config, [windowed and not turn for turn in turns])

    def layer(n: int) -> Any:
        window = int(config["sliding_window"]) if windowed and sliding[n] else 0
        return usual_layer(config, window=window, **({} if turns[n] else {"rope": None}))

    return Decoder(ctx, usual(config, layers=each_layer(config, layer)), max_positions)
