"""Gemma 3 text models: windows on five layers of six with a rotation of their own, norms on both sides of each block.

Norm weights are stored as their distance from 1, and embeddings are scaled by the square root of the hidden size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from phloem.core.errors import ModelLoadError
from phloem.layers.rope import rope_spec
from phloem.models._common import Decoder, DecoderConfig, LayerKind, layer_types, usual

if TYPE_CHECKING:
    from phloem.layers.context import BuildContext

_EVERY = 6  # of so many layers the last one is global


def decoder_config(config: dict[str, Any]) -> DecoderConfig:
    if config.get("use_bidirectional_attention"):
        raise ModelLoadError("use_bidirectional_attention: an encoder cannot be served as a causal language model")
    base = usual(config)
    every = int(config.get("sliding_window_pattern") or _EVERY)
    sliding = layer_types(config, [bool((number + 1) % every) for number in range(len(base.layers))])
    # The old spelling names the local base apart and applies `rope_scaling` to the global layers alone.
    old = {**config, "rope_theta": config.get("rope_theta", 1e6)}
    local_base = config.get("rope_local_base_freq", 1e4)
    nested = "sliding_attention" in (config.get("rope_parameters") or {})
    local_source = old if nested else {"rope_theta": local_base}
    local = LayerKind(rope_spec(local_source, base.head_size, "sliding_attention"), int(config["sliding_window"]))
    whole = LayerKind(rope_spec(old, base.head_size, "full_attention"))
    return usual(
        config,
        layers=tuple(local if window else whole for window in sliding),
        activation=config.get("hidden_activation", config.get("hidden_act", "gelu_pytorch_tanh")),
        scale=float(config.get("query_pre_attn_scalar", 256)) ** -0.5,
        tied=bool(config.get("tie_word_embeddings", True)),
        qk_norm=True,
        sandwich_norms=True,
        norm_shift=1.0,
        embed_scale=base.hidden_size**0.5,
        attention_softcap=float(config.get("attn_logit_softcapping") or 0.0),
        logit_softcap=float(config.get("final_logit_softcapping") or 0.0),
    )


def build(config: dict[str, Any], ctx: BuildContext, max_positions: int) -> Decoder:
    return Decoder(ctx, decoder_config(config), max_positions)
