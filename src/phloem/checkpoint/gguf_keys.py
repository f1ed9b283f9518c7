"""Metadata of a GGUF file that no family reads: what leaves every answer as it is, and what is refused.

A key under the architecture's prefix is read (`gguf_config.KEYS`, a family's `keys`, `gguf_rope`), or stands here with
the values that change nothing, or is refused: a file that asks for more than is computed must not be served.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from phloem.core.errors import ModelLoadError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    Test = Callable[[Any, Mapping[str, Any]], bool]  # (value, config) -> whether it changes nothing

LOG = logging.getLogger("phloem.checkpoint")

# Sizes that tensors say too, notes about the training, and what only models of embeddings use.
_HARMLESS = {
    "vocab_size", "tensor_data_layout", "pooling_type", "rope.scaling.finetuned", "leading_dense_block_count",
    "attention.layer_norm_epsilon", "decoder_start_token_id",
}  # fmt: skip


def _as_head(value: Any, config: Mapping[str, Any]) -> bool:
    return value == head_size(config)


def _nothing(value: Any, config: Mapping[str, Any]) -> bool:
    del config
    return value in (0, False, "")


def _at_most_one(value: Any, config: Mapping[str, Any]) -> bool:
    del config
    return value in (0, 1)


def _usual_scale(value: Any, config: Mapping[str, Any]) -> bool:
    return value == 0 or abs(value * head_size(config) ** 0.5 - 1) < 1e-4


def _no_window(value: Any, config: Mapping[str, Any]) -> bool:
    return value == 0 or value >= config["max_position_embeddings"]


def _without_experts(value: Any, config: Mapping[str, Any]) -> bool:
    return value == 0 or not config.get("num_experts")


# Without a window the layers of a pattern are all alike.
_NEUTRAL: dict[str, Test] = {
    "attention.value_length": _as_head,
    "attention.key_length_swa": _as_head,
    "attention.value_length_swa": _as_head,
    "attention.scale": _usual_scale,
    "attention.causal": lambda value, config: bool(value),
    "attention.sliding_window": _no_window,
    "attention.sliding_window_pattern": lambda value, config: not config.get("sliding_window"),
    "expert_feed_forward_length": _without_experts,
    "expert_used_count": _without_experts,
    "expert_weights_norm": _without_experts,
    "rope.dimension_count_swa": lambda value, config: value == rotary_size(config),
    "rope.dimension_sections": lambda value, config: not any(value[1:]),
    "rope.freq_base_swa": lambda value, config: not config.get("sliding_window") or value == config.get("rope_theta"),
    **dict.fromkeys(
        (
            "logit_scale", "residual_scale", "embedding_scale", "attention.output_scale", "expert_weights_scale",
            "expert_group_count", "expert_group_used_count", "expert_group_scale", "expert_gating_func",
            "interleave_moe_layer_step", "rope.scaling.yarn_attn_factor",
        ),
        _at_most_one,
    ),
}  # fmt: skip


def head_size(config: Mapping[str, Any]) -> int:
    heads = config.get("num_attention_heads")  # none: no layer attends
    return config.get("head_dim") or (config["hidden_size"] // heads if heads else 0)


def rotary_size(config: Mapping[str, Any]) -> int:
    """How many of a head's dimensions turn."""
    return int(head_size(config) * config.get("partial_rotary_factor", 1.0))


def check_unread(metadata: Mapping[str, Any], arch: str, read: set[str], config: Mapping[str, Any], path: Path) -> None:
    """Refuse what is not read and would change an answer.

    Args:
        read: names without the architecture's prefix.
        config: what was made of those that are read.

    Raises:
        ModelLoadError: naming every such key with its value.
    """
    refused: list[str] = []
    for key, value in metadata.items():
        name = key.removeprefix(f"{arch}.")
        if name == key or name in read or name in _HARMLESS or _harmless(name, value, config):
            continue
        # A text is a note, but for those that name a way of computing.
        if isinstance(value, str) and not name.startswith(("rope.", "attention.")):
            LOG.warning("%s: %s is not known, and %r not heeded", path, key, value)
        else:
            refused.append(f"{key} = {value}")
    if refused:
        raise ModelLoadError(
            f"{path}: its metadata asks for what is not supported for {config['model_type']}: {', '.join(refused)}"
        )


def _harmless(name: str, value: Any, config: Mapping[str, Any]) -> bool:
    test = _NEUTRAL.get(name, _nothing)
    several = isinstance(value, Iterable) and not isinstance(value, str)
    try:
        values: list[Any] = [item if isinstance(item, str) else float(item) for item in value] if several else [value]
    except TypeError:  # arrays of arrays
        return False
    if name == "rope.dimension_sections":
        return test(values, config)
    return all(test(item, config) for item in values)
