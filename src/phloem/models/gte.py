"""GTE (gte-multilingual as `model_type: gte`): BERT with rotated positions and gated blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from phloem.core.errors import ModelLoadError
from phloem.layers.attention import AttentionOptions
from phloem.layers.rope import rope_spec
from phloem.models._encoder import Encoder, EncoderConfig, check_encodes
from phloem.models._layer import MLP, Attention, LayerKind

if TYPE_CHECKING:
    from phloem.layers.context import BuildContext

ENCODER = {}
DEFAULTS = {
    "layer_norm_eps": 1e-12,
    "type_vocab_size": 1,
    "hidden_act": "gelu",
    "max_position_embeddings": 8192,
    "rope_theta": 160000.0,
}
TINY = {"num_key_value_heads": None, "head_dim": None}
VARIANTS = {"bare": {"type_vocab_size": 0, "rope_parameters": {"rope_type": "default", "rope_theta": 50.0}}}

# What the code behind the first files can do, and what the published ones have.
_SERVED = {
    "position_embedding_type": "rope",
    "layer_norm_type": "layer_norm",
    "logn_attention_scale": False,
    "pack_qkv": True,
}


class Gte(Encoder):
    """An encoder whose files with a head have another prefix."""

    def checkpoint_name(self, name: str) -> str | None:
        return super().checkpoint_name(name.removeprefix("gte."))


def build(config: dict[str, Any], ctx: BuildContext, max_positions: int) -> Encoder:
    check_encodes(config)
    for key, served in _SERVED.items():
        if config.get(key, served) != served:
            raise ModelLoadError(f"{key}: {config[key]!r} is not served; known: {served!r}")
    heads, size = config["num_attention_heads"], config["hidden_size"]
    options = AttentionOptions(qkv_bias=True, out_bias=True, fused="qkv_proj")
    rope = rope_spec(config, size // heads)
    attention = Attention(heads, heads, size // heads, rope, options=options, name="attention", causal=False)
    inner, activation = config["intermediate_size"], str(config["hidden_act"])
    feed = MLP(inner, activation, fused="up_gate_proj", up_first=True, down_bias=True)
    kind = LayerKind(attention, feed, "sum", ("attn_ln", "mlp_ln"))
    config_of_all = EncoderConfig(
        vocab_size=config["vocab_size"],
        hidden_size=size,
        eps=float(config["layer_norm_eps"]),
        layers=(kind,) * config["num_hidden_layers"],
        prefix="new.",
        head="pooler",
        types=int(config["type_vocab_size"]),
    )
    return Gte(ctx, config_of_all, max_positions)
