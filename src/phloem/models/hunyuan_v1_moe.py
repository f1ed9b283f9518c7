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
