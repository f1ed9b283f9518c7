"""RoBERTa: BERT whose positions begin behind the padding's row, with one kind of segment."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from phloem.models._encoder import Encoder, bert_like

if TYPE_CHECKING:
    from phloem.layers.context import BuildContext

ENCODER = {"padded_positions": True}
DEFAULTS = {"layer_norm_eps": 1e-5, "type_vocab_size": 1, "hidden_act": "gelu", "pad_token_id": 1}
GGUF_FAMILY = "bert"
TINY = {"num_key_value_heads": None, "head_dim": None, "pad_token_id": 1, "bos_token_id": 0, "type_vocab_size": 1}
VARIANTS = {}


def build(config: dict[str, Any], ctx: BuildContext, max_positions: int) -> Encoder:
    rows = config["max_position_embeddings"], config["pad_token_id"] + 1
    return Encoder(ctx, bert_like(config, prefix="roberta.", head="dense", positions=rows), max_positions)
