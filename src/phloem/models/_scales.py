"""Scales of a float8 KV cache that come with a checkpoint.

A cached key is the key divided by its layer's `k_scale`, a value likewise. They are stored beside the attention's
weights, under the names that compressed-tensors, ModelOpt and vLLM's converters give them. A latent is key and value in
one and has one scale: the larger of those that its layer has.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING

from phloem.core.errors import ModelLoadError
from phloem.core.memory import Latent, Paged

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from phloem.checkpoint.describe import Checkpoint
    from phloem.core.memory import MemorySpec

LayerScales = tuple[tuple[float, ...], tuple[float, ...]]  # of keys, of values: one number, or one per kv head

_NAME = re.compile(
    r"model\.layers\.(\d+)\.self_attn\."
    r"(?:(?:attn\.|qkv_proj\.)?(k|v|kv)_scale|k_proj\.(k)_scale|v_proj\.(v)_scale|(k|v)_proj\.output_scale)"
)


def scale_of(name: str) -> tuple[int, str] | None:
    """(layer, "k", "v" or "kv") of a tensor that is a scale of the KV cache, else None."""
    match = _NAME.fullmatch(name)
    return (int(match[1]), next(part for part in match.groups()[1:] if part)) if match else None


def scales_of(spec: MemorySpec) -> int:
    """How many scales a float8 cache of it may have for its keys: one, or one per kv head; 0: it has none."""
    if isinstance(spec, Latent):
        return int(spec.rope > 0)  # an indexer's keys are kept in 16 bits or more
    return spec.kv_heads if isinstance(spec, Paged) else 0


def scaled_pools(memory: Sequence[MemorySpec], layers: Sequence[Sequence[int]]) -> dict[int, int]:
    """By the number of a layer, as names in files have it, the pool index of what it keeps in 8 bits. Layers with
    several of those have scales under names that are not read.

    Args:
        layers: pool indexes of each layer.
    """
    kept = {number: [pool for pool in pools if scales_of(memory[pool])] for number, pools in enumerate(layers)}
    return {number: pools[0] for number, pools in kept.items() if len(pools) == 1}


def read_kv_scales(
    checkpoint: Checkpoint,
    memory: Sequence[MemorySpec],
    pools: dict[int, int],
    rename: Callable[[str], str | None],
) -> dict[int, LayerScales]:
    """Scales by pool index; pools without any are left out.

    Args:
        memory: of the model, by pool index.
        pools: by the number of a layer, see `scaled_pools`.
        rename: the model's own name of a tensor in a file.

    Raises:
        ModelLoadError: for a scale that is not a positive number, or of another shape.
    """
    if not checkpoint.files:
        return {}
    from safetensors import safe_open

    found: dict[tuple[int, str], tuple[float, ...]] = {}
    for path in checkpoint.files:
        file = safe_open(str(path), framework="pt", device="cpu")
        for key in file.keys():  # noqa: SIM118 - not a dict
            # A base model's names lack the prefix.
            place = scale_of(rename(key) or "") or scale_of(rename(f"model.{key}") or "")
            if place is None or place[0] not in pools:
                continue
            heads = scales_of(memory[pools[place[0]]])
            values = tuple(float(value) for value in file.get_tensor(key).float().reshape(-1).tolist())
            if len(values) not in (1, heads):
                raise ModelLoadError(f"{path}: {key} has {len(values)} elements; one, or one per kv head, is known")
            if not all(math.isfinite(value) and value > 0 for value in values):
                raise ModelLoadError(f"{path}: {key} is {values}, which no scale can be")
            found[place] = values
    scales: dict[int, LayerScales] = {}
    for layer, pool in pools.items():
        both = found.get((layer, "kv"))
        k, v = found.get((layer, "k"), both), found.get((layer, "v"), both)
        if k is not None or v is not None:
            if isinstance(memory[pool], Latent):
                k = v = max(one for one in (k, v) if one is not None)
            k, v = k or (1.0,), v or (1.0,)
            width = max(len(k), len(v))
            scales[pool] = tuple(part if len(part) == width else part * width for part in (k, v))  # pyright: ignore[reportArgumentType]
    return scales
