"""Hunyuan dense: Llama whose q and k are normalised behind the rotation, which is stretched by a fixed factor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from phloem.models._common import Decoder, each_layer, usual, usual_layer

if TYPE_CHECKING:
    from phloem.layers.context import BuildContext

DEFAULTS = {"head_dim": 128}
# The factor on the base of its rotation is in the base that files say.
GGUF = {
    "architecture": "hunyuan-dense",
    "hf_class": "HunYuanDenseV1ForCausalLM",
    "names": {"self_attn.query_layernorm": "attn_q_norm", "self_attn.key_layernorm": "attn_k_norm"},
}
TINY = {}
VARIANTS = {
    "alpha": {
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "alpha": 1000.0, "factor": 1.0},
        "attention_bias": True,
        "tie_word_embeddings": True,
    }
}


def build(config: dict[str, Any], ctx: BuildContext, max_positions: int) -> Decoder:
    kind = usual_layer(config, qk_norm="after", q_norm="query_layernorm", k_norm="key_layernorm")
    return Decoder(ctx, usual(config, layers=each_layer(config, lambda n: kind)), max_positions)
