"""OPT: learned positions that begin at row 2, layer norms, ReLU between two plain matrices."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from phloem.core.errors import ModelLoadError
from phloem.models._common import Decoder, each_layer, renamed, usual, usual_attention
from phloem.models._layer import LayerKind, Plain

if TYPE_CHECKING:
    from phloem.layers.context import BuildContext

DEFAULTS = {
    "activation_function": "relu",
    "enable_bias": True,
    "do_layer_norm_before": True,
    "tie_word_embeddings": True,
}
SPELLING = {"intermediate_size": "ffn_dim"}
TINY = {
    "ffn_dim": 64,
    "word_embed_proj_dim": None,
    "intermediate_size": None,
    "num_key_value_heads": None,
    "head_dim": None,
}
VARIANTS = {"no-bias": {"enable_bias": False}}

_RENAMED = {"final_layer_norm.": "norm."}  # beside the layers; those in a layer are its own
_FIRST = 2  # rows of the table before that of position 0


class OPT(Decoder):
    """A decoder whose files have other names, with or without `model.` before them."""

    def checkpoint_name(self, name: str) -> str | None:
        inner = name.removeprefix("model.").removeprefix("decoder.")
        if inner == name:
            return name
        return "model." + (renamed(inner, _RENAMED) or inner)


def build(config: dict[str, Any], ctx: BuildContext, max_positions: int) -> Decoder:
    if not config["do_layer_norm_before"]:
        raise ModelLoadError("do_layer_norm_before false (OPT-350m): norms behind the sum are not served")
    if config.get("word_embed_proj_dim") not in (None, config["hidden_size"]):
        raise ModelLoadError("word_embed_proj_dim: embeddings of another width (OPT-350m) are not served")
    if not config.get("layer_norm_elementwise_affine", True):
        raise ModelLoadError("layer_norm_elementwise_affine false: norms without weights are not served")
    bias = bool(config["enable_bias"])
    config = {**config, "num_key_value_heads": None}  # every head has its own
    attention = usual_attention(config, rope=None, o_proj="out_proj", qkv_bias=bias, out_bias=bias)
    feed = Plain(config["ffn_dim"], config["activation_function"], bias, ("fc1", "fc2"), name="")
    kind = LayerKind(attention, feed, norm_names=("self_attn_layer_norm", "final_layer_norm"))
    config_of_all = usual(
        config,
        layers=each_layer(config, lambda n: kind),
        eps=1e-5,
        tied=bool(config.get("tie_word_embeddings", True)),
        norms="layer",
        positions=(config["max_position_embeddings"] + _FIRST, _FIRST),
    )
    return OPT(ctx, config_of_all, max_positions)
