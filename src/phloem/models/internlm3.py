"""InternLM3: Llama under other names in its config.json."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from phloem.models._common import Decoder, usual

if TYPE_CHECKING:
    from phloem.layers.context import BuildContext

SPELLING = {"attention_bias": "qkv_bias", "mlp_bias": "bias"}
DEFAULTS = {"head_dim": 128}
GGUF_FAMILY = "llama"
TINY = {}
VARIANTS = {"bias": {"attention_bias": True, "mlp_bias": True}}


def build(config: dict[str, Any], ctx: BuildContext, max_positions: int) -> Decoder:
    return Decoder(ctx, usual(config), max_positions)
