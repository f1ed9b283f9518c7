"""What the process that compiles beside the loading is told (`ahead.Plan`), before any weight is there.

The model's layers are known without them, and with those the attention backend and the type of the cache.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch

from phloem.adapters import served
from phloem.checkpoint.kv_scheme import FP8
from phloem.core import speculation
from phloem.core.errors import ConfigError, PhloemError
from phloem.distributed.groups import Groups
from phloem.engine.choices.dtypes import kept_in, stored_scales, unasked
from phloem.engine.choices.kept import choice_of
from phloem.engine.ranks.counts import spread_of
from phloem.engine.ranks.parallel import mesh_of, shared
from phloem.engine.warmup import warm
from phloem.layers.context import BuildContext
from phloem.models import build_model
from phloem.utils.cores import available_cores

if TYPE_CHECKING:
    from phloem.checkpoint.describe import Checkpoint
    from phloem.core.config import Config
    from phloem.distributed.mesh import Mesh
    from phloem.kernels.ops import Ops
    from phloem.models import Model
    from phloem.platforms import Platform


def plan_of(
    config: Config,
    checkpoint: Checkpoint,
    platform: Platform,
    ops: Ops,
    dtype: torch.dtype,
    sizes: tuple[int, int],
    apart: str,
) -> tuple[dict[str, Any], str | None]:
    """What the process is told, or why there is none. `sizes`: rows that may run, and tokens of a step; `apart`: why
    other things than our own kernels, on the device alone, compute the model."""
    if ops.name not in warm.TABLES:
        return {}, f"the op table {ops.name!r} has no such kernels"
    if apart:
        return {}, f"{apart}: which kernels it needs shows when it runs"
    try:
        told = _told if checkpoint.pooling is None else _pooled
        return _common(config, checkpoint, ops, dtype, sizes) | told(config, checkpoint, platform, ops, dtype), None
    except PhloemError as error:  # loading will meet the same, and say so
        return {}, error.message


def _common(
    config: Config, checkpoint: Checkpoint, ops: Ops, dtype: torch.dtype, sizes: tuple[int, int]
) -> dict[str, Any]:
    return {
        "model_type": checkpoint.model_type,
        "config": checkpoint.config,
        "context": checkpoint.context_length,
        "vocab": checkpoint.vocab_size,
        "ops": ops.name,
        "dtype": str(dtype).removeprefix("torch."),
        "running": sizes[0],
        "chunk": sizes[1],
        "processes": available_cores(),
        "path": str(checkpoint.path),
        "files": [str(file) for file in checkpoint.files],
        "quantization": config.model.quantization,
        "stored": None if checkpoint.stored is None else asdict(checkpoint.stored),
        "consolidated": checkpoint.consolidated,
        "gguf": "" if checkpoint.gguf is None else str(checkpoint.gguf.path),
    }


def _pooled(config: Config, checkpoint: Checkpoint, platform: Platform, ops: Ops, dtype: torch.dtype) -> dict[str, Any]:
    """Of a model that reads whole texts, and keeps nothing."""
    del platform, ops
    if checkpoint.stored is not None:
        raise ConfigError("a model that reads whole texts, and is quantised, is known once its weights are")
    model = asdict(config.model) | {"model_path": str(checkpoint.path)}
    return {"kv_dtype": str(dtype).removeprefix("torch."), "page": None, "pooled": model}


def _told(config: Config, checkpoint: Checkpoint, platform: Platform, ops: Ops, dtype: torch.dtype) -> dict[str, Any]:
    spread, mesh = spread_of(config, checkpoint), mesh_of(config, 0)
    ctx = BuildContext(ops, dtype, torch.device("meta"))
    if mesh.size > 1:
        ctx = shared(ctx, mesh, Groups(), config.runtime.moe_a2a_backend)
    model = build_model(checkpoint.model_type, checkpoint.config, ctx, checkpoint.context_length)
    kv_dtype = unasked(config, checkpoint, model, platform, ops) or kept_in(config, dtype, model)
    scales = _scales(config, checkpoint, model, kv_dtype)
    chosen = choice_of(config, model, platform, ops, kv_dtype, max((keys for keys, _ in scales.values()), default=0))
    drafts = speculation.wanted(config)
    return {
        "kv_dtype": str(kv_dtype).removeprefix("torch."),
        "page": config.cache.page_size,
        "backend": chosen.backend.name,
        "scales": scales,
        "adapters": served.sizes(config.lora, on_host=False)[:2] if served.enabled(config.lora) else None,
        "drafting": asdict(drafts) if drafts.algorithm in speculation.MODELS else None,
        "ranks": None if mesh.size == 1 else _arrangement(mesh, config.runtime.moe_a2a_backend),
        "spread": None if spread is None else (spread.redundant, spread.counting),
        "told": config.runtime.enable_return_routed_experts,
    }


def _arrangement(mesh: Mesh, backend: str) -> dict[str, Any]:
    """As `alone.Arrangement`."""
    return {axis: getattr(mesh, axis).size for axis in ("pp", "dp", "cp", "tp", "ep")} | {"backend": backend}


def _scales(config: Config, checkpoint: Checkpoint, model: Model, kv_dtype: torch.dtype) -> dict[int, tuple[int, int]]:
    """How many scales the keys and the values of each layer have in a float8 cache."""
    read = config.cache.kv_cache_dtype == FP8 and checkpoint.kv_scheme in (None, FP8)
    if kv_dtype.itemsize > 1 or not read:
        return {}
    return {pool: (len(k), len(v)) for pool, (k, v) in stored_scales(model, checkpoint).items()}
