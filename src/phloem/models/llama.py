"""Llama 2 and 3.x, and what is built like them (SmolLM2, TinyLlama, Yi, ...)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from phloem.models._common import Decoder, usual

if TYPE_CHECKING:
    from phloem.layers.context import BuildContext

GGUF = {"architecture": "llama", "hf_class": "LlamaForCausalLM", "turned": ("q_proj", "k_proj")}
TINY = {}
VARIANTS = {
    "tied": {"tie_word_embeddings": True},
    "bias": {"attention_bias": True, "mlp_bias": True},
    "one-kv-head": {"num_key_value_heads": 1},
}


def build(config: dict[str, Any], ctx: BuildContext, max_positions: int) -> Decoder:
    return Decoder(ctx, usual(config), max_positions)
