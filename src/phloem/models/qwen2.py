"""Qwen2 and Qwen2.5: Llama with a bias on q, k and v, and a window over the upper layers where that is switched on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from phloem.models._common import Decoder, each_layer, layer_types, usual, usual_layer

if TYPE_CHECKING:
    from phloem.layers.context import BuildContext

GGUF = {
    "architecture": "qwen2",
    "hf_class": "Qwen2ForCausalLM",
    "also": ("qwen2vl",),  # whose tower is another file: it serves texts alone, to which all its axes are one
    "unheeded": ("rope.dimension_sections", "n_deepstack_layers"),
}
TINY = {"head_dim": None}
VARIANTS = {"window": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}}


def windows(config: dict[str, Any]) -> list[int]:
    """The window of each layer; 0: none."""
    window = int(config.get("sliding_window") or 0) if config.get("use_sliding_window") else 0
    first = int(config.get("max_window_layers", 0))
    upper = [bool(window) and number >= first for number in range(config["num_hidden_layers"])]
    return [window if local else 0 for local in layer_types(config, upper)]


class Qwen2(Decoder):
    """A decoder whose files may hold layers that draft (MiMo's), which are read by what drafts."""

    def checkpoint_name(self, name: str) -> str | None:
        return None if name.startswith("model.mtp_layers.") else super().checkpoint_name(name)


def build(config: dict[str, Any], ctx: BuildContext, max_positions: int) -> Decoder:
    sizes = windows(config)
    layers = each_layer(config, lambda n: usual_layer(config, window=sizes[n], qkv_bias=True, out_bias=False))
    return Qwen2(ctx, usual(config, layers=layers), max_positions)
