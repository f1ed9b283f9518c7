"""StableLM: layer norms around a gated MLP, a quarter of each head turns; in some, attention and MLP read one norm."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from phloem.core.errors import ModelLoadError
from phloem.models._common import Decoder, each_layer, usual, usual_attention, usual_mlp
from phloem.models._layer import LayerKind

if TYPE_CHECKING:
    from phloem.layers.context import BuildContext

DEFAULTS = {"layer_norm_eps": 1e-5, "partial_rotary_factor": 0.25}
GGUF = {
    "architecture": "stablelm",
    "hf_class": "StableLmForCausalLM",
    "keys": {
        "layer_norm_eps": "attention.layer_norm_epsilon",
        "use_parallel_residual": ("use_parallel_residual", False),
    },
    "flags": {"use_qkv_bias": "attn_q.bias"},
}
TINY = {"head_dim": None, "hidden_size": 64}
VARIANTS = {"parallel": {"use_parallel_residual": True, "use_qkv_bias": True}}


def build(config: dict[str, Any], ctx: BuildContext, max_positions: int) -> Decoder:
    if config.get("qk_layernorm"):
        raise ModelLoadError("qk_layernorm: a layer norm with weights of its own for each head is not served")
    attention = usual_attention(config, qkv_bias=bool(config.get("use_qkv_bias", False)), out_bias=False)
    norms = "parallel" if config.get("use_parallel_residual") else "pre"
    kind = LayerKind(attention, usual_mlp(config), norms=norms)
    config_of_all = usual(
        config,
        layers=each_layer(config, lambda n: kind),
        eps=float(config["layer_norm_eps"]),
        norms="layer",
    )
    return Decoder(ctx, config_of_all, max_positions)
