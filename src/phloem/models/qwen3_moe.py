"""Qwen3 with experts: every layer, or every n-th, has a sparse block in place of the MLP."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from phloem.layers.moe import ExpertsConfig
from phloem.layers.rope import rope_spec
from phloem.models._common import Decoder, LayerKind, layer_types, usual

if TYPE_CHECKING:
    from phloem.layers.context import BuildContext


def build(config: dict[str, Any], ctx: BuildContext, max_positions: int) -> Decoder:
    experts = ExpertsConfig(
        # Newer files have the second name.
        count=config.get("num_experts") or config["num_local_experts"],
        per_token=config["num_experts_per_tok"],
        inner_size=config["moe_intermediate_size"],
        renormalise=bool(config.get("norm_topk_prob", False)),
    )
    step, dense = int(config.get("decoder_sparse_step", 1)), config.get("mlp_only_layers") or []
    base = usual(config)
    window = int(config.get("sliding_window") or 0) if config.get("use_sliding_window") else 0
    first = int(config.get("max_window_layers", 0))
    sliding = layer_types(config, [bool(window) and number >= first for number in range(len(base.layers))])
    rope = rope_spec(config, base.head_size)
    layers = tuple(
        LayerKind(rope, window if local else 0, experts if (n + 1) % step == 0 and n not in dense else None)
        for n, local in enumerate(sliding)
    )
    return Decoder(ctx, replace(base, layers=layers, qk_norm=True), max_positions)
