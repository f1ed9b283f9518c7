"""BERT: learned positions, two kinds of segments, norms of the sums."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from phloem.models._encoder import Encoder, bert_like

if TYPE_CHECKING:
    from phloem.layers.context import BuildContext

ENCODER = {}
DEFAULTS = {"layer_norm_eps": 1e-12, "type_vocab_size": 2, "hidden_act": "gelu"}
TINY = {"num_key_value_heads": None, "head_dim": None}
VARIANTS = {"tanh": {"hidden_act": "gelu_new"}}


def build(config: dict[str, Any], ctx: BuildContext, max_positions: int) -> Encoder:
    return Encoder(ctx, bert_like(config), max_positions)
