"""MPNet: RoBERTa without segments, whose attention has a bias for each distance."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from phloem.models._encoder import Encoder, bert_layer, bert_like

if TYPE_CHECKING:
    from phloem.layers.context import BuildContext

ENCODER = {"padded_positions": True}
DEFAULTS = {"layer_norm_eps": 1e-12, "hidden_act": "gelu", "relative_attention_num_buckets": 32, "pad_token_id": 1}
TINY = {"num_key_value_heads": None, "head_dim": None, "pad_token_id": 1, "bos_token_id": 0}
VARIANTS = {}


def build(config: dict[str, Any], ctx: BuildContext, max_positions: int) -> Encoder:
    layer = bert_layer(
        config,
        projections=("attention.attn.q", "attention.attn.k", "attention.attn.v", "attention.attn.o"),
        norms=("attention.LayerNorm", "output.LayerNorm"),
    )
    own = {
        "prefix": "mpnet.",
        "head": "dense",
        "types": 0,
        "positions": (config["max_position_embeddings"], config["pad_token_id"] + 1),
        "layers": (layer,) * config["num_hidden_layers"],
        "relative": config["relative_attention_num_buckets"],
    }
    return Encoder(ctx, bert_like(config, **own), max_positions)
