"""EXAONE 4: norms behind both blocks, q and k normalised by head; global layers beside windows do not rotate."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from phloem.models._common import Decoder, each_layer, layer_types, usual, usual_attention, usual_mlp
from phloem.models._layer import Attention, LayerKind

if TYPE_CHECKING:
    from phloem.layers.context import BuildContext

IGNORED = (r"mtp\..*",)
GGUF = {
    "architecture": "exaone4",
    "hf_class": "Exaone4ForCausalLM",
    "keys": {
        "sliding_window": ("attention.sliding_window", 0),
        "layer_types": ("attention.sliding_window_pattern", None),
    },
    "names": {
        "post_attention_layernorm": "post_attention_norm",
        "post_feedforward_layernorm": "post_ffw_norm",
    },
}
TINY = {"head_dim": None, "num_hidden_layers": 4, "sliding_window": 6, "sliding_window_pattern": 4}
VARIANTS = {"no-window": {"sliding_window": None}}


def attentions(config: dict[str, Any]) -> list[Attention]:
    """Each layer's."""
    count, window = config["num_hidden_layers"], int(config.get("sliding_window") or 0)
    pattern = config.get("sliding_window_pattern") or 4  # published as a number or as letters: "LLLG"
    every = len(pattern) if isinstance(pattern, str) else int(pattern)
    local = [bool((number + 1) % every) for number in range(count)]
    sliding = layer_types(config, local) if window else [False] * count

    def made(n: int) -> Attention:
        turning: dict[str, Any] = {} if sliding[n] or not window else {"rope": None}
        return usual_attention(config, window=window if sliding[n] else 0, qk_norm="head", **turning)

    return [made(n) for n in range(count)]


def build(config: dict[str, Any], ctx: BuildContext, max_positions: int) -> Decoder:
    made = attentions(config)
    layers = each_layer(config, lambda n: LayerKind(made[n], usual_mlp(config), norms="post"))
    return Decoder(ctx, usual(config, layers=layers), max_positions)
