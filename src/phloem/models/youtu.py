"""Youtu-LLM: DeepSeek V3's latent attention beside dense blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from phloem.models._common import Decoder, each_layer, usual, usual_mlp
from phloem.models._layer import LayerKind
from phloem.models.deepseek_v3 import latent_attention

if TYPE_CHECKING:
    from phloem.layers.context import BuildContext

DEFAULTS = {"rope_interleave": True, "tie_word_embeddings": True}
TINY = {
    "pad_token_id": None,  # whose row transformers sets to zero when it loads a tied head
    "head_dim": None,
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
}
VARIANTS = {"plain": {"q_lora_rank": None, "rope_interleave": False, "tie_word_embeddings": False}}


def build(config: dict[str, Any], ctx: BuildContext, max_positions: int) -> Decoder:
    attention = latent_attention(config, interleaved=bool(config["rope_interleave"]))
    kind = LayerKind(attention, usual_mlp(config))
    tied = bool(config["tie_word_embeddings"])
    return Decoder(ctx, usual(config, layers=each_layer(config, lambda n: kind), tied=tied), max_positions)
