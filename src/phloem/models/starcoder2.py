"""StarCoder 2: layer norms, biases everywhere, two plain matrices with GeLU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from phloem.models._common import Decoder, each_layer, usual, usual_attention
from phloem.models._layer import LayerKind, Plain

if TYPE_CHECKING:
    from phloem.layers.context import BuildContext

DEFAULTS = {"use_bias": True, "tie_word_embeddings": True, "norm_epsilon": 1e-5}
GGUF = {
    "architecture": "starcoder2",
    "hf_class": "Starcoder2ForCausalLM",
    "keys": {"norm_epsilon": "attention.layer_norm_epsilon"},
    "config": {"hidden_act": "gelu_pytorch_tanh"},
    "names": {"mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"},
}
TINY = {"head_dim": None, "sliding_window": 9}
VARIANTS = {"no-bias": {"use_bias": False, "sliding_window": None, "tie_word_embeddings": False}}


def build(config: dict[str, Any], ctx: BuildContext, max_positions: int) -> Decoder:
    bias = bool(config.get("use_bias", True))
    window = int(config.get("sliding_window") or 0)
    feed = Plain(config["intermediate_size"], config.get("hidden_act", "gelu_pytorch_tanh"), bias, ("c_fc", "c_proj"))
    kind = LayerKind(usual_attention(config, window=window, qkv_bias=bias, out_bias=bias), feed)
    config_of_all = usual(
        config,
        layers=each_layer(config, lambda n: kind),
        eps=float(config["norm_epsilon"]),
        tied=bool(config.get("tie_word_embeddings", True)),
        norms="layer",
    )
    return Decoder(ctx, config_of_all, max_positions)
