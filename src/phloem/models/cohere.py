"""Command R: one layer norm, of which attention and MLP both read; a rotation of neighbours, scaled logits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from phloem.core.errors import ModelLoadError
from phloem.layers.rope import rope_spec
from phloem.models._common import Decoder, each_layer, usual, usual_attention, usual_mlp
from phloem.models._layer import LayerKind

if TYPE_CHECKING:
    from phloem.layers.context import BuildContext

DEFAULTS = {"rope_theta": 500000.0, "logit_scale": 0.0625, "tie_word_embeddings": True, "layer_norm_eps": 1e-5}
GGUF = {
    "architecture": "command-r",
    "hf_class": "CohereForCausalLM",
    "keys": {"layer_norm_eps": "attention.layer_norm_epsilon", "logit_scale": "logit_scale"},
}
TINY = {"head_dim": None, "logit_scale": 0.5}
VARIANTS = {"bias": {"attention_bias": True}}


def build(config: dict[str, Any], ctx: BuildContext, max_positions: int) -> Decoder:
    if config.get("use_qk_norm"):
        raise ModelLoadError("use_qk_norm: a layer norm with weights of its own for each head is not served")
    head_size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    attention = usual_attention(config, rope=rope_spec(config, head_size, interleaved=True))
    kind = LayerKind(attention, usual_mlp(config), norms="parallel")
    config_of_all = usual(
        config,
        layers=each_layer(config, lambda n: kind),
        eps=float(config["layer_norm_eps"]),
        tied=bool(config.get("tie_word_embeddings", True)),
        norms="layer-without-bias",
        logit_scale=float(config.get("logit_scale") or 1.0),
    )
    return Decoder(ctx, config_of_all, max_positions)
