"""Youtu-LLM: DeepSeek V3's latent attention beside dense blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from phloem.models._common import Decoder, each_layer, usual, usual_mlp
from phloem.models._layer import LayerKind
from phloem.models.deepseek_v3 import latent_attention

if TYPE_CHECKING:
    from phloem.layers.context import BuildContext

DEFAULTS = {"rope_interleave": True, "tie_word_embeddings": True}
GGUF = {
    "architecture": "deepseek2",
    "hf_class": "YoutuForCausalLM",
    "dense": True,
    "keys": {
        "q_lora_rank": ("attention.q_lora_rank", 0),
        "kv_lora_rank": "attention.kv_lora_rank",
        "qk_rope_head_dim": "rope.dimension_count",
        "head_dim": "rope.dimension_count",
    },
    "config": {"rope_interleave": True},
    "names": {
        "self_attn.q_a_proj": "attn_q_a",
        "self_attn.q_a_layernorm": "attn_q_a_norm",
        "self_attn.q_b_proj": "attn_q_b",
        "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
        "self_attn.kv_a_layernorm": "attn_kv_a_norm",
        "self_attn.kv_b_proj": "attn_kv_b",
    },
    # Of experts, where there are none.
    "unheeded": (
        "expert_feed_forward_length",
        "expert_shared_count",
        "expert_weights_scale",
        "leading_dense_block_count",
    ),
}
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
