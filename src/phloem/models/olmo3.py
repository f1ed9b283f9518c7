"""OLMo 3: OLMo 2 with windows on three layers of four; only the global ones have a stretched rotation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from phloem.layers.rope import rope_spec
from phloem.models._common import Decoder, each_layer, layer_types, usual, usual_attention, usual_mlp
from phloem.models._layer import LayerKind

if TYPE_CHECKING:
    from phloem.layers.context import BuildContext

DEFAULTS = {"rope_theta": 500000.0}
# Files are OLMo 2's, whose family serves them.
GGUF = {
    "architecture": "olmo3",
    "hf_class": "Olmo3ForCausalLM",
    "written_as": "olmo2",
    "keys": {
        "sliding_window": ("attention.sliding_window", 0),
        "layer_types": ("attention.sliding_window_pattern", None),
    },
    "names": {"post_attention_layernorm": "post_attention_norm", "post_feedforward_layernorm": "post_ffw_norm"},
}
TINY = {"head_dim": None, "num_hidden_layers": 4, "sliding_window": 6}
VARIANTS = {
    "yarn": {
        "rope_parameters": {
            "full_attention": {
                "rope_type": "yarn",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "original_max_position_embeddings": 16,
                "attention_factor": 1.2079441541679836,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
            },
            "sliding_attention": {"rope_type": "default", "rope_theta": 500000.0},
        }
    }
}


def build(config: dict[str, Any], ctx: BuildContext, max_positions: int) -> Decoder:
    count, window = config["num_hidden_layers"], int(config.get("sliding_window") or 0)
    sliding = layer_types(config, [bool((number + 1) % 4) for number in range(count)])
    head_size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    # The old spelling has one `rope_scaling`, which is the global layers' alone.
    nested = "sliding_attention" in (config.get("rope_parameters") or {})
    local_source = config if nested else {"rope_theta": config.get("rope_theta", 500000.0)}
    local = rope_spec(local_source, head_size, "sliding_attention")
    whole = rope_spec(config, head_size, "full_attention")

    def layer(n: int) -> LayerKind:
        rope, size = (local, window) if sliding[n] else (whole, 0)
        return LayerKind(
            usual_attention(config, rope=rope, window=size, qk_norm="whole"), usual_mlp(config), norms="post"
        )

    return Decoder(ctx, usual(config, layers=each_layer(config, layer)), max_positions)
