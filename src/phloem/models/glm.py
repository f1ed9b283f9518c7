"""GLM-4-9B and GLM-Edge: half of each head turns, neighbours paired; gate and up in one tensor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from phloem.layers.rope import rope_spec
from phloem.models._common import Decoder, each_layer, usual, usual_attention, usual_mlp
from phloem.models._layer import LayerKind

if TYPE_CHECKING:
    from phloem.layers.context import BuildContext

DEFAULTS = {"attention_bias": True, "head_dim": 128, "partial_rotary_factor": 0.5}
GGUF = {
    "architecture": "chatglm",
    "hf_class": "GlmForCausalLM",
    "names": {"mlp.gate_up_proj": "ffn_up"},
}
TINY = {}
VARIANTS = {"no-bias": {"attention_bias": False, "tie_word_embeddings": True}}


def build(config: dict[str, Any], ctx: BuildContext, max_positions: int) -> Decoder:
    head_size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]  # GGUF: not said
    rope = rope_spec(config, head_size, interleaved=True)
    attention = usual_attention(config, rope=rope, out_bias=False)
    kind = LayerKind(attention, usual_mlp(config, fused="gate_up_proj"))
    return Decoder(ctx, usual(config, layers=each_layer(config, lambda n: kind)), max_positions)
