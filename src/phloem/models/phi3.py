"""Phi-3, Phi-3.5 and Phi-4: Llama whose checkpoints keep q, k and v in one tensor, and gate and up in another.

The stretched ones have two lists of divisors (LongRoPE), of which the served context length chooses one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from phloem.models._common import Decoder, each_layer, usual, usual_attention, usual_mlp
from phloem.models._layer import LayerKind

if TYPE_CHECKING:
    from phloem.layers.context import BuildContext

GGUF = {
    "architecture": "phi3",
    "hf_class": "Phi3ForCausalLM",
    "keys": {"sliding_window": ("attention.sliding_window", 0)},
    "names": {"self_attn.qkv_proj": "attn_qkv", "mlp.gate_up_proj": "ffn_up"},
}
TINY = {"head_dim": None, "sliding_window": None}
VARIANTS = {
    "window": {"sliding_window": 7},
    "long": {
        "partial_rotary_factor": 0.5,
        "original_max_position_embeddings": 16,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
            "long_factor": [1.5, 3.0],
            "short_factor": [1.0, 1.25],
        },
    },
    "short": {
        "original_max_position_embeddings": 512,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "long_factor": [1.5, 3.0, 4.0, 8.0],
            "short_factor": [1.0, 1.25, 1.5, 1.75],
        },
    },
}


def build(config: dict[str, Any], ctx: BuildContext, max_positions: int) -> Decoder:
    window = int(config.get("sliding_window") or 0)
    rope = config.get("rope_parameters") or {}
    if rope.get("rope_type") in ("su", "yarn"):  # what the first files call it
        config = {**config, "rope_parameters": {**rope, "rope_type": "longrope"}}
    attention = usual_attention(config, window=window, fused="qkv_proj")
    kind = LayerKind(attention, usual_mlp(config, fused="gate_up_proj"))
    return Decoder(ctx, usual(config, layers=each_layer(config, lambda n: kind)), max_positions)
