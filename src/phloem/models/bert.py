"""BERT: learned positions, two kinds of segments, norms of the sums."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from phloem.models._encoder import Encoder, bert_like

if TYPE_CHECKING:
    from phloem.layers.context import BuildContext

ENCODER = {}
DEFAULTS = {"layer_norm_eps": 1e-12, "type_vocab_size": 2, "hidden_act": "gelu"}
# RoBERTa and DistilBERT are written so too, the rows of positions that no token has left out.
GGUF = {
    "architecture": "bert",
    "hf_class": "BertModel",
    "keys": {"layer_norm_eps": "attention.layer_norm_epsilon", "is_causal": ("attention.causal", True)},
    "config": {"hidden_act": "gelu"},
    "rows": {
        "type_vocab_size": ("token_types.weight", 0),  # DistilBERT has no segments
        "num_labels": ("cls.output.weight", 0),
        "dense_head": ("cls.weight", 0),  # RoBERTa's rerankers; of BERT's the converter leaves out the layer before
    },
    "unheeded": ("classifier.output_labels",),
    "names": {
        "embeddings.word_embeddings.weight": "token_embd.weight",
        "embeddings.position_embeddings.weight": "position_embd.weight",
        "embeddings.token_type_embeddings.weight": "token_types.weight",
        "embeddings.LayerNorm.weight": "token_embd_norm.weight",
        "embeddings.LayerNorm.bias": "token_embd_norm.bias",
        "attention.self.query": "attn_q",
        "attention.self.key": "attn_k",
        "attention.self.value": "attn_v",
        "attention.output.dense": "attn_output",
        "attention.output.LayerNorm": "attn_output_norm",
        "intermediate.dense": "ffn_up",
        "output.dense": "ffn_down",
        "output.LayerNorm": "layer_output_norm",
        "classifier.dense.weight": "cls.weight",
        "classifier.dense.bias": "cls.bias",
        "classifier.out_proj.weight": "cls.output.weight",
        "classifier.out_proj.bias": "cls.output.bias",
    },
}
TINY = {"num_key_value_heads": None, "head_dim": None}
VARIANTS = {"tanh": {"hidden_act": "gelu_new"}}


def build(config: dict[str, Any], ctx: BuildContext, max_positions: int) -> Encoder:
    head = {"head": "dense"} if config.get("dense_head") else {}
    return Encoder(ctx, bert_like(config, **head), max_positions)
