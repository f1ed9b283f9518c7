"""Helium: Llama whose rotation pairs neighbours."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from phloem.layers.rope import rope_spec
from phloem.models._common import Decoder, each_layer, usual, usual_layer

if TYPE_CHECKING:
    from phloem.layers.context import BuildContext

DEFAULTS = {"head_dim": 128, "rope_theta": 100000.0}
TINY = {"head_dim": 8}
VARIANTS = {"bias": {"attention_bias": True, "mlp_bias": True}}


def build(config: dict[str, Any], ctx: BuildContext, max_positions: int) -> Decoder:
    kind = usual_layer(config, rope=rope_spec(config, config["head_dim"], interleaved=True), out_bias=False)
    return Decoder(ctx, usual(config, layers=each_layer(config, lambda n: kind)), max_positions)
