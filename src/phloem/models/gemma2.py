"""Gemma 2: soft caps on attention and logits, windows on every other layer, norms on both sides of each block."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from phloem.models._common import Decoder, DecoderConfig, each_layer, layer_types, usual, usual_attention, usual_mlp
from phloem.models._layer import LayerKind, Norms

if TYPE_CHECKING:
    from phloem.layers.context import BuildContext

DEFAULTS = {
    "head_dim": 256,
    "sliding_window": 4096,
    "query_pre_attn_scalar": 256,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "tie_word_embeddings": True,
}
GGUF = {
    "architecture": "gemma2",
    "hf_class": "Gemma2ForCausalLM",
    "keys": {
        "head_dim": ("attention.key_length", 256),
        "sliding_window": ("attention.sliding_window", 4096),
        "layer_types": ("attention.sliding_window_pattern", None),
        "attn_logit_softcapping": ("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": ("final_logit_softcapping", 30.0),
    },
    "config": {"hidden_activation": "gelu_pytorch_tanh"},
    "names": {
        "post_attention_layernorm": "post_attention_norm",
        "pre_feedforward_layernorm": "ffn_norm",
        "post_feedforward_layernorm": "post_ffw_norm",
    },
    "norm_shift": 1.0,
}
# Small weights: a cap of 50 would hide itself.
TINY = {"num_hidden_layers": 4, "sliding_window": 8, "query_pre_attn_scalar": 16}
VARIANTS = {
    "caps": {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 1.5},
    "scalar": {"query_pre_attn_scalar": 5},
}

_LARGE = 46  # layers of 27B, which alone scales attention by the width per head; GGUF files do not say it


def decoder_config(config: dict[str, Any], norms: Norms = "sandwich", names: tuple[str, ...] = ()) -> DecoderConfig:
    """What config.json describes. `norms`, `names`: where the norms stand, and what they are called."""
    count, window = config["num_hidden_layers"], int(config.get("sliding_window") or 0)
    sliding = layer_types(config, [number % 2 == 0 for number in range(count)])
    width = config["hidden_size"] // config["num_attention_heads"]
    scalar = config.get("query_pre_attn_scalar") or (width if count == _LARGE else config["head_dim"])
    activation = config.get("hidden_activation", "gelu_pytorch_tanh")

    def layer(n: int) -> LayerKind:
        attention = usual_attention(
            config,
            window=window if sliding[n] else 0,
            scale=float(scalar) ** -0.5,
            softcap=float(config.get("attn_logit_softcapping") or 0.0),
        )
        return LayerKind(attention, usual_mlp(config, activation=activation), norms=norms, norm_names=names)

    return usual(
        config,
        layers=each_layer(config, layer),
        tied=bool(config.get("tie_word_embeddings", True)),
        norm_shift=1.0,
        embed_scale=config["hidden_size"] ** 0.5,
        logit_softcap=float(config.get("final_logit_softcapping") or 0.0),
    )


def build(config: dict[str, Any], ctx: BuildContext, max_positions: int) -> Decoder:
    return Decoder(ctx, decoder_config(config), max_positions)
