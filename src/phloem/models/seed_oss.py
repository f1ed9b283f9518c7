"""Seed-OSS: Llama with biases on q, k and v."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from phloem.models._common import Decoder, usual

if TYPE_CHECKING:
    from phloem.layers.context import BuildContext

DEFAULTS = {"attention_bias": True, "attention_out_bias": False, "head_dim": 128}
GGUF = {
    "architecture": "seed_oss",
    "hf_class": "SeedOssForCausalLM",
    "keys": {"head_dim": ("attention.key_length", 128)},
    "config": {"attention_bias": True, "attention_out_bias": False},
    "names": {"post_attention_layernorm": "post_attention_norm"},
}
TINY = {}
VARIANTS = {"out-bias": {"attention_out_bias": True, "mlp_bias": True}}


def build(config: dict[str, Any], ctx: BuildContext, max_positions: int) -> Decoder:
    return Decoder(ctx, usual(config), max_positions)
