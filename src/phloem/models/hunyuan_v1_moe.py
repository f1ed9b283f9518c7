"""Hunyuan-A13B: Hunyuan with a sparse block beside a dense one in every layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from phloem.core.errors import ModelLoadError
from phloem.kernels.specs import RouterSpec
from phloem.layers.moe import ExpertNames, ExpertsConfig
from phloem.models._common import Decoder, each_layer, usual, usual_attention, usual_mlp
from phloem.models._layer import Experts, LayerKind

if TYPE_CHECKING:
    from phloem.layers.context import BuildContext

DEFAULTS = {"moe_topk": 1}
# The factor on the base of its rotation is in the base that files say. Of the shared block they say the width of one
# shared expert; its tensors are of all of them.
GGUF = {
    "architecture": "hunyuan-moe",
    "hf_class": "HunYuanMoEV1ForCausalLM",
    "keys": {
        "num_experts": "expert_count",
        "moe_topk": "expert_used_count",
        "moe_intermediate_size": ("expert_feed_forward_length", None),
        "num_shared_expert": ("expert_shared_count", None),
        "shared_width": ("expert_shared_feed_forward_length", None),
    },
    "names": {
        "self_attn.query_layernorm": "attn_q_norm",
        "self_attn.key_layernorm": "attn_k_norm",
        "mlp.gate.wg": "ffn_gate_inp",
        "mlp.shared_mlp.gate_proj": "ffn_gate_shexp",
        "mlp.shared_mlp.up_proj": "ffn_up_shexp",
        "mlp.shared_mlp.down_proj": "ffn_down_shexp",
    },
}
TINY = {"num_experts": 6, "moe_topk": 2, "intermediate_size": 24}
VARIANTS = {
    "alpha": {
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "alpha": 1000.0, "factor": 1.0},
        "moe_topk": [3, 3, 3],
        "tie_word_embeddings": True,
    }
}

_NAMES = ExpertNames(router="gate.wg")


def _same(config: dict[str, Any], key: str) -> int:
    """A number that may be listed for each layer. Raises ModelLoadError unless all are the same."""
    value = config.get(key)
    values: set[Any] = set(value) if isinstance(value, list) else {value}
    if len(values) != 1:
        raise ModelLoadError(f"{key}: layers that differ ({value}) are not served")
    return int(values.pop() or 0)


def build(config: dict[str, Any], ctx: BuildContext, max_positions: int) -> Decoder:
    router = RouterSpec(_same(config, "moe_topk"), renormalise=True)
    inner = config["intermediate_size"]
    if config.get("moe_intermediate_size") is not None:
        inner = _same(config, "moe_intermediate_size")
    sparse = ExpertsConfig(_same(config, "num_experts"), inner, router, names=_NAMES)
    width = config["intermediate_size"]
    if config.get("num_shared_expert") is not None:
        width *= _same(config, "num_shared_expert")
    shared = usual_mlp(config, inner_size=width, name="shared_mlp")
    attention = usual_attention(config, qk_norm="after", q_norm="query_layernorm", k_norm="key_layernorm")
    kind = LayerKind(attention, Experts(sparse, shared=shared))
    return Decoder(ctx, usual(config, layers=each_layer(config, lambda n: kind)), max_positions)
