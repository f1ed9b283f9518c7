"""Nomic BERT (nomic-embed-text): BERT with rotated positions, gated blocks, and no biases outside its norms."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from phloem.core.errors import ModelLoadError
from phloem.layers.attention import AttentionOptions
from phloem.layers.rope import rope_spec
from phloem.models._encoder import Encoder, EncoderConfig, check_encodes
from phloem.models._layer import MLP, Attention, LayerKind

if TYPE_CHECKING:
    from phloem.layers.context import BuildContext

ENCODER = {}
# `max_position_embeddings`: what it was trained with; the rotation is never stretched beyond that.
DEFAULTS = {
    "layer_norm_eps": 1e-12,
    "type_vocab_size": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rope_theta": 1000.0,
}
SPELLING = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "intermediate_size": "n_inner",
    "max_position_embeddings": "max_trained_positions",
    "layer_norm_eps": "layer_norm_epsilon",
    "hidden_act": "activation_function",
    "rope_theta": "rotary_emb_base",
}
GGUF = {
    "architecture": "nomic-bert",
    "hf_class": "NomicBertModel",
    "keys": {"layer_norm_eps": "attention.layer_norm_epsilon", "is_causal": ("attention.causal", True)},
    "config": {"hidden_act": "silu"},
    "rows": {"type_vocab_size": "token_types.weight"},
    "names": {
        "embeddings.word_embeddings.weight": "token_embd.weight",
        "embeddings.token_type_embeddings.weight": "token_types.weight",
        "embeddings.LayerNorm.weight": "token_embd_norm.weight",
        "embeddings.LayerNorm.bias": "token_embd_norm.bias",
        "self_attn.Wqkv": "attn_qkv",
        "post_attention_layernorm": "attn_output_norm",
        "post_mlp_layernorm": "layer_output_norm",
    },
}
TINY = {"num_key_value_heads": None, "head_dim": None}
VARIANTS = {"turned": {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}, "type_vocab_size": 1}}

# What the published code can do and no published model does.
_SERVED = {
    "prenorm": (False,),
    "causal": (False,),
    "use_rms_norm": (False, None),
    "rotary_emb_fraction": (1.0,),
    "rotary_emb_interleaved": (False,),
    "rotary_emb_scale_base": (None,),
    "qkv_proj_bias": (False,),
    "mlp_fc1_bias": (False,),
    "mlp_fc2_bias": (False,),
    "parallel_block": (False,),
    "moe_every_n_layers": (0, None),
}


_LAYER = re.compile(r"encoder\.(layers\.\d+)\.([\w.]+)\.(\w+)")
_INSIDE = {
    "attn.Wqkv": "self_attn.Wqkv",
    "attn.out_proj": "self_attn.o_proj",
    "norm1": "post_attention_layernorm",
    "norm2": "post_mlp_layernorm",
    "mlp.fc11": "mlp.up_proj",
    "mlp.fc12": "mlp.gate_proj",
    "mlp.fc2": "mlp.down_proj",
}


class NomicBert(Encoder):
    """An encoder whose files have other names, and with a head one of two prefixes."""

    def checkpoint_name(self, name: str) -> str | None:
        found = super().checkpoint_name(name.removeprefix("bert."))
        match = _LAYER.fullmatch(found or "")
        if match is not None:
            return f"{match[1]}.{_INSIDE.get(match[2], match[2])}.{match[3]}"
        return found.replace("emb_ln.", "embeddings.LayerNorm.") if found else found


def build(config: dict[str, Any], ctx: BuildContext, max_positions: int) -> Encoder:
    check_encodes(config)
    for key, served in _SERVED.items():
        if config.get(key, served[0]) not in served:
            raise ModelLoadError(f"{key}: {config[key]!r} is not served; known: {served[0]!r}")
    activation = str(config["hidden_act"])
    if activation not in ("silu", "swiglu"):  # two names of one
        raise ModelLoadError(f"hidden_act: {activation!r} is not served; known: silu, swiglu")
    heads, size = config["num_attention_heads"], config["hidden_size"]
    rope, options = rope_spec(config, size // heads), AttentionOptions(fused="Wqkv")
    attention = Attention(heads, heads, size // heads, rope, options=options, causal=False)
    norms = ("post_attention_layernorm", "post_mlp_layernorm")
    kind = LayerKind(attention, MLP(config["intermediate_size"]), "sum", norms)
    config_of_all = EncoderConfig(
        vocab_size=config["vocab_size"],
        hidden_size=size,
        eps=float(config["layer_norm_eps"]),
        layers=(kind,) * config["num_hidden_layers"],
        prefix="nomic_bert.",
        head="pooler",
        layer="layers",
        types=int(config["type_vocab_size"]),
    )
    return NomicBert(ctx, config_of_all, max_positions)
