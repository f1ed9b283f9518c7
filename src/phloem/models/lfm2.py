"""LFM2: short convolutions, with attention in some layers; q and k are normalised by head."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from phloem.layers.recurrent import ConvSizes, ShortConv
from phloem.models._common import Decoder, each_layer, usual, usual_attention, usual_mlp
from phloem.models._layer import LayerKind, Recurrent

if TYPE_CHECKING:
    from phloem.layers.context import BuildContext
    from phloem.models._layer import MakeFeed

DEFAULTS = {
    "norm_eps": 1e-5,
    "conv_L_cache": 3,
    "conv_bias": False,
    "rope_theta": 1e6,
    "block_auto_adjust_ff_dim": True,
    "block_ffn_dim_multiplier": 1.0,
    "block_multiple_of": 256,
}
GGUF = {
    "architecture": "lfm2",
    "hf_class": "Lfm2ForCausalLM",
    "keys": {"norm_eps": "attention.layer_norm_rms_epsilon", "conv_L_cache": "shortconv.l_cache"},
    "config": {"block_auto_adjust_ff_dim": False, "conv_bias": False},
    "layers_with": {"full_attn_idxs": "attn_q.weight"},
    "names": {
        "operator_norm": "attn_norm",
        "ffn_norm": "ffn_norm",
        "self_attn.out_proj": "attn_output",
        "self_attn.q_layernorm": "attn_q_norm",
        "self_attn.k_layernorm": "attn_k_norm",
        "conv.conv": "shortconv.conv",
        "conv.in_proj": "shortconv.in_proj",
        "conv.out_proj": "shortconv.out_proj",
        "feed_forward.gate_proj": "ffn_gate",
        "feed_forward.up_proj": "ffn_up",
        "feed_forward.down_proj": "ffn_down",
    },
}
TINY = {
    "num_hidden_layers": 4,
    "head_dim": None,
    "block_multiple_of": 16,
    "layer_types": ["conv", "full_attention", "conv", "full_attention"],
}
VARIANTS = {
    "bias": {"conv_bias": True, "conv_L_cache": 4, "block_auto_adjust_ff_dim": False},
    "conv-alone": {"layer_types": ["conv", "conv", "conv", "conv"]},
}

_BLOCK = {
    ".feed_forward.w1.": ".feed_forward.gate_proj.",
    ".feed_forward.w3.": ".feed_forward.up_proj.",
    ".feed_forward.w2.": ".feed_forward.down_proj.",
}


class Lfm2(Decoder):
    """A decoder whose files number the projections of dense blocks."""

    def checkpoint_name(self, name: str) -> str | None:
        for theirs, ours in _BLOCK.items():
            name = name.replace(theirs, ours)
        return name


def inner_size(config: dict[str, Any]) -> int:
    """Of a dense block: what config.json says is adjusted."""
    size = int(config.get("block_ff_dim") or config["intermediate_size"])
    if not config["block_auto_adjust_ff_dim"]:
        return size
    size, unit = int(2 * size / 3), int(config["block_multiple_of"])
    if config["block_ffn_dim_multiplier"] is not None:
        size = int(config["block_ffn_dim_multiplier"] * size)
        size = -(-size // unit) * unit
    return size


def attends(config: dict[str, Any]) -> list[bool]:
    """Which layers attend; the others are convolutions."""
    count = config["num_hidden_layers"]
    kinds = config.get("layer_types")
    if kinds:
        return [kind != "conv" for kind in kinds]
    listed = config.get("full_attn_idxs")
    return [listed is None or number in listed for number in range(count)]


def hybrid(config: dict[str, Any], ctx: BuildContext, max_positions: int, feeds: list[MakeFeed]) -> Decoder:
    """`feeds`: the feed-forward block of each layer."""
    eps = float(config["norm_eps"])
    attention = usual_attention(
        config, qk_norm="head", q_norm="q_layernorm", k_norm="k_layernorm", o_proj="out_proj", eps=eps
    )
    sizes = ConvSizes(int(config["conv_L_cache"]), bool(config["conv_bias"]))
    conv, full = Recurrent(ShortConv, sizes, "conv"), attends(config)
    names = ("operator_norm", "ffn_norm")

    def layer(n: int) -> LayerKind:
        return LayerKind(attention if full[n] else conv, feeds[n], norm_names=names)

    tied = config.get("tie_embedding", config.get("tie_word_embeddings", True))
    config_of_all = usual(
        config, layers=each_layer(config, layer), eps=eps, tied=bool(tied), norm_name="embedding_norm"
    )
    return Lfm2(ctx, config_of_all, max_positions)


def build(config: dict[str, Any], ctx: BuildContext, max_positions: int) -> Decoder:
    feed = usual_mlp(config, inner_size=inner_size(config), name="feed_forward")
    return hybrid(config, ctx, max_positions, [feed] * config["num_hidden_layers"])
