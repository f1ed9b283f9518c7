"""VaultGemma: Gemma 2 without the norms behind its blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from phloem.models._common import Decoder
from phloem.models.gemma2 import DEFAULTS, decoder_config

if TYPE_CHECKING:
    from phloem.layers.context import BuildContext

__all__ = ["DEFAULTS", "build"]

TINY = {"num_hidden_layers": 4, "sliding_window": 8, "query_pre_attn_scalar": 16}
VARIANTS = {"caps": {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 1.5}}

_NORMS = ("input_layernorm", "pre_feedforward_layernorm")


def build(config: dict[str, Any], ctx: BuildContext, max_positions: int) -> Decoder:
    return Decoder(ctx, decoder_config(config, "pre", _NORMS), max_positions)
