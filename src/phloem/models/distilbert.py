"""DistilBERT: BERT without segments, under other names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from phloem.models._encoder import Encoder, bert_layer, bert_like

if TYPE_CHECKING:
    from phloem.layers.context import BuildContext

ENCODER = {}
DEFAULTS = {"activation": "gelu"}
SPELLING = {
    "hidden_size": "dim",
    "intermediate_size": "hidden_dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
}
GGUF_FAMILY = "bert"
TINY = {
    "dim": 32,
    "hidden_dim": 64,
    "n_layers": 3,
    "n_heads": 4,
    "hidden_size": None,
    "intermediate_size": None,
    "num_hidden_layers": None,
    "num_attention_heads": None,
    "num_key_value_heads": None,
    "head_dim": None,
}
VARIANTS = {}


def build(config: dict[str, Any], ctx: BuildContext, max_positions: int) -> Encoder:
    layer = bert_layer(
        {**config, "hidden_act": config["activation"]},
        projections=("attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin"),
        feed=("ffn.lin1", "ffn.lin2"),
        norms=("sa_layer_norm", "output_layer_norm"),
    )
    layers = (layer,) * config["num_hidden_layers"]
    own = {"prefix": "distilbert.", "layer": "transformer.layer", "head": "pre", "types": 0, "layers": layers}
    return Encoder(ctx, bert_like(config, eps=1e-12, **own), max_positions)
