"""Gemma 3 text models: windows on five layers of six with a rotation of their own, norms on both sides of each block.

EmbeddingGemma is one whose tokens see each other both ways: it makes vectors and does not generate.

Norm weights are stored as their distance from 1, and embeddings are scaled by the square root of the hidden size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from phloem.layers.rope import rope_spec
from phloem.models._common import Decoder, DecoderConfig, each_layer, layer_types, usual, usual_attention, usual_mlp
from phloem.models._layer import LayerKind

if TYPE_CHECKING:
    from phloem.layers.context import BuildContext

# Multimodal checkpoints leave out whatever equals these.
DEFAULTS = {
    "vocab_size": 262208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "sliding_window": 4096,
    "query_pre_attn_scalar": 256,
    "tie_word_embeddings": True,
}
GGUF = {
    "architecture": "gemma3",
    "hf_class": "Gemma3ForCausalLM",
    "also": ("gemma-embedding",),
    "beside": {"gemma-embedding": {"use_bidirectional_attention": True, "architectures": ["Gemma3TextModel"]}},
    "keys": {
        "head_dim": ("attention.key_length", 256),
        "num_key_value_heads": ("attention.head_count_kv", 4),
        "rope_local_base_freq": ("rope.freq_base_swa", 10000.0),
        "sliding_window": ("attention.sliding_window", 0),
        "layer_types": ("attention.sliding_window_pattern", None),
        "attn_logit_softcapping": ("attn_logit_softcapping", None),
        "final_logit_softcapping": ("final_logit_softcapping", None),
    },
    "config": {"hidden_activation": "gelu_pytorch_tanh"},
    "names": {
        "post_attention_layernorm": "post_attention_norm",
        "pre_feedforward_layernorm": "ffn_norm",
        "post_feedforward_layernorm": "post_ffw_norm",
    },
    "norm_shift": 1.0,
    # Of EmbeddingGemma's dense layers, whose tensors say the same.
    "unheeded": ("dense_2_feat_in", "dense_2_feat_out", "dense_3_feat_in", "dense_3_feat_out"),
}
TINY = {"num_hidden_layers": 7, "sliding_window": 8, "query_pre_attn_scalar": 24}
VARIANTS = {"caps": {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 2.0}}

_EVERY = 6  # of so many layers the last one is global
_WIDE = 62  # layers of 27B, which alone scales attention by the width per head; GGUF files do not say it


def decoder_config(config: dict[str, Any]) -> DecoderConfig:
    both_ways, window = bool(config.get("use_bidirectional_attention")), int(config["sliding_window"])
    if both_ways:  # EmbeddingGemma: tokens see as many on either side as the window has in halves
        window = window // 2 + 1
    every = int(config.get("sliding_window_pattern") or _EVERY)
    count, head_size = config["num_hidden_layers"], config["head_dim"]
    sliding = layer_types(config, [bool((number + 1) % every) for number in range(count)])
    # The old spelling names the local base apart and applies `rope_scaling` to the global layers alone.
    old = {**config, "rope_theta": config.get("rope_theta", 1e6)}
    local_base = config.get("rope_local_base_freq", 1e4)
    nested = "sliding_attention" in (config.get("rope_parameters") or {})
    local_source = old if nested else {"rope_theta": local_base}
    local = rope_spec(local_source, head_size, "sliding_attention")
    whole = rope_spec(old, head_size, "full_attention")
    width = config["hidden_size"] // config["num_attention_heads"]
    scalar = config.get("query_pre_attn_scalar") or (width if count == _WIDE else head_size)
    activation = config.get("hidden_activation", "gelu_pytorch_tanh")

    def layer(n: int) -> LayerKind:
        attention = usual_attention(
            config,
            rope=local if sliding[n] else whole,
            window=window if sliding[n] else 0,
            causal=not both_ways,
            scale=float(scalar) ** -0.5,
            softcap=float(config.get("attn_logit_softcapping") or 0.0),
            qk_norm="head",
            norm_shift=1.0,
        )
        return LayerKind(attention, usual_mlp(config, activation=activation), norms="sandwich")

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
