"""ModernBERT: rotated positions, norms before the blocks, windows in most layers, a gated MLP."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from phloem.layers.attention import AttentionOptions
from phloem.layers.rope import rope_spec
from phloem.models._common import each_layer, layer_types
from phloem.models._encoder import Encoder, EncoderConfig, check_encodes
from phloem.models._layer import MLP, Attention, LayerKind

if TYPE_CHECKING:
    from phloem.layers.context import BuildContext

ENCODER = {"pooling_key": "classifier_pooling"}
DEFAULTS = {
    "norm_eps": 1e-5,
    "norm_bias": False,
    "hidden_activation": "gelu",
    "local_attention": 128,
    "global_attn_every_n_layers": 3,
    "global_rope_theta": 160000.0,
    "local_rope_theta": 10000.0,
    "attention_bias": False,
    "mlp_bias": False,
}
GGUF = {
    "architecture": "modern-bert",
    "hf_class": "ModernBertModel",
    "keys": {
        "norm_eps": "attention.layer_norm_epsilon",
        "is_causal": ("attention.causal", True),
        "local_attention": "attention.sliding_window",
        "global_attn_every_n_layers": ("attention.sliding_window_pattern", 3),
        "global_rope_theta": ("rope.freq_base", 160000.0),
        "local_rope_theta": ("rope.freq_base_swa", 10000.0),
        "hidden_activation": ("hidden_act", "gelu"),
    },
    "flags": {"attention_bias": "attn_qkv.bias", "mlp_bias": "ffn_up.bias", "norm_bias": "ffn_norm.bias"},
    "names": {
        "embeddings.tok_embeddings.weight": "token_embd.weight",
        "embeddings.norm.weight": "token_embd_norm.weight",
        "embeddings.norm.bias": "token_embd_norm.bias",
        "final_norm.weight": "output_norm.weight",
        "final_norm.bias": "output_norm.bias",
        "mlp_norm": "ffn_norm",
        "attn.Wqkv": "attn_qkv",
        "attn.Wo": "attn_output",
        "mlp.Wi": "ffn_up",
        "mlp.Wo": "ffn_down",
    },
}
TINY = {
    "num_key_value_heads": None,
    "head_dim": None,
    "num_hidden_layers": 4,
    "local_attention": 8,
    "cls_token_id": 1,
    "sep_token_id": 3,
}
VARIANTS = {"bias": {"attention_bias": True, "mlp_bias": True, "norm_bias": True}}


def build(config: dict[str, Any], ctx: BuildContext, max_positions: int) -> Encoder:
    check_encodes(config)
    heads, size = config["num_attention_heads"], config["hidden_size"]
    every = config["global_attn_every_n_layers"]  # 0: none of them is local
    local = layer_types(config, [bool(every and number % every) for number in range(config["num_hidden_layers"])])
    # Files before `rope_parameters` name the two bases apart.
    nested = "full_attention" in (config.get("rope_parameters") or {})
    ropes = [
        rope_spec(config if nested else {"rope_theta": config[base]}, size // heads, kind)
        for kind, base in (("full_attention", "global_rope_theta"), ("sliding_attention", "local_rope_theta"))
    ]
    bias = bool(config["attention_bias"])
    options = AttentionOptions(qkv_bias=bias, out_bias=bias, fused="Wqkv", o_proj="Wo")
    feed = MLP(
        config["intermediate_size"], config["hidden_activation"], bool(config["mlp_bias"]), "Wi", "mlp", down="Wo"
    )

    def layer(n: int) -> LayerKind:
        # A window of w sees w // 2 tokens on each side.
        window = config["local_attention"] // 2 + 1 if local[n] else 0
        attention = Attention(
            heads, heads, size // heads, ropes[local[n]], window, options=options, name="attn", causal=False
        )
        return LayerKind(attention, feed, norm_names=("attn_norm" if n else "", "mlp_norm"))

    config_of_all = EncoderConfig(
        vocab_size=config["vocab_size"],
        hidden_size=size,
        eps=float(config["norm_eps"]),
        layers=each_layer(config, layer),
        prefix="model.",
        head="norm",
        embed="embeddings.tok_embeddings",
        embed_norm="embeddings.norm",
        layer="layers",
        final_norm="final_norm",
        norms="layer" if config["norm_bias"] else "layer-without-bias",
    )
    return Encoder(ctx, config_of_all, max_positions)
