"""GLM-4-0414: GLM-4 with norms on both sides of each block, under names of their own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from phloem.layers.rope import rope_spec
from phloem.models._common import Decoder, each_layer, usual, usual_attention, usual_mlp
from phloem.models._layer import LayerKind
from phloem.models.glm import DEFAULTS as DEFAULTS

if TYPE_CHECKING:
    from phloem.layers.context import BuildContext

GGUF = {
    "architecture": "glm4",
    "hf_class": "Glm4ForCausalLM",
    "names": {
        "mlp.gate_up_proj": "ffn_up",
        "post_self_attn_layernorm": "post_attention_norm",
        "post_attention_layernorm": "ffn_norm",
        "post_mlp_layernorm": "post_ffw_norm",
    },
}
TINY = {}
VARIANTS = {"no-bias": {"attention_bias": False, "tie_word_embeddings": True}}

_NORMS = ("input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm")


def build(config: dict[str, Any], ctx: BuildContext, max_positions: int) -> Decoder:
    rope = rope_spec(config, config["head_dim"], interleaved=True)
    attention = usual_attention(config, rope=rope, out_bias=False)
    kind = LayerKind(attention, usual_mlp(config, fused="gate_up_proj"), norms="sandwich", norm_names=_NORMS)
    return Decoder(ctx, usual(config, layers=each_layer(config, lambda n: kind)), max_positions)
