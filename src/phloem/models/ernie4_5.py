"""ERNIE 4.5 dense: Llama whose rotation pairs neighbours."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from phloem.layers.rope import rope_spec
from phloem.models._common import Decoder, each_layer, usual, usual_attention, usual_mlp
from phloem.models._layer import LayerKind

if TYPE_CHECKING:
    from phloem.layers.context import BuildContext

DEFAULTS = {"head_dim": 128, "tie_word_embeddings": True, "rope_theta": 500000.0}
GGUF = {
    "architecture": "ernie4_5",
    "hf_class": "Ernie4_5ForCausalLM",
    "flags": {"use_bias": "attn_q.bias"},
}
TINY = {}
VARIANTS = {"bias": {"use_bias": True, "tie_word_embeddings": False}}


def build(config: dict[str, Any], ctx: BuildContext, max_positions: int) -> Decoder:
    bias = bool(config.get("use_bias", False))
    rope = rope_spec(config, config["head_dim"], interleaved=True)
    attention = usual_attention(config, rope=rope, qkv_bias=bias, out_bias=bias)
    kind = LayerKind(attention, usual_mlp(config, bias=bias))
    return Decoder(ctx, usual(config, layers=each_layer(config, lambda n: kind)), max_positions)
