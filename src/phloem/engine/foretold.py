"""What the process that compiles beside the loading is told (`engine.ahead.Plan`), before any weight is there.

The model's layers are known without them, and with those the attention backend and the type of the cache.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch

from phloem.adapters import served
from phloem.checkpoint.kv_scheme import FP8
from phloem.core import speculation
from phloem.core.errors import PhloemError
from phloem.engine import warm
from phloem.engine.dtypes import kept_in, stored_scales, unasked
from phloem.engine.kept import choice_of
from phloem.engine.parallel import ranks_of
from phloem.layers.context import BuildContext
from phloem.models import build_model
from phloem.utils.cores import available_cores

if TYPE_CHECKING:
    from phloem.checkpoint.describe import Checkpoint
    from phloem.core.config import Config
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
    eager: str,
) -> tuple[dict[str, Any], str | None]:
    """What the process is told, or why there is none. `sizes`: rows that may run, and tokens of a step; `eager`: why
    steps cannot be recorded."""
    if ops.name not in warm.TABLES:
        return {}, f"the op table {ops.name!r} has no such kernels"
    if eager:
        return {}, f"{eager}: which kernels it needs shows when it runs"
    if ranks_of(config) > 1:
        return {}, "several ranks have other sizes than the whole model, and launch their kernels together"
    try:
        return _told(config, checkpoint, platform, ops, dtype, sizes), None
    except PhloemError as error:  # loading will meet the same, and say so
        return {}, error.message


def _told(
    config: Config, checkpoint: Checkpoint, platform: Platform, ops: Ops, dtype: torch.dtype, sizes: tuple[int, int]
) -> dict[str, Any]:
    ctx = BuildContext(ops, dtype, torch.device("meta"))
    model = build_model(checkpoint.model_type, checkpoint.config, ctx, checkpoint.context_length)
    kv_dtype = unasked(config, checkpoint, model, platform, ops) or kept_in(config, dtype, model)
    scales = _scales(config, checkpoint, model, kv_dtype)
    chosen = choice_of(config, model, platform, ops, kv_dtype, max((keys for keys, _ in scales.values()), default=0))
    drafts = speculation.wanted(config)
    return {
        "model_type": checkpoint.model_type,
        "config": checkpoint.config,
        "context": checkpoint.context_length,
        "vocab": checkpoint.vocab_size,
        "ops": ops.name,
        "dtype": str(dtype).removeprefix("torch."),
        "kv_dtype": str(kv_dtype).removeprefix("torch."),
        "page": config.cache.page_size,
        "running": sizes[0],
        "chunk": sizes[1],
        "processes": available_cores(),
        "backend": chosen.backend.name,
        "scales": scales,
        "adapters": served.sizes(config.lora, on_host=False)[:2] if served.enabled(config.lora) else None,
        "drafting": asdict(drafts) if drafts.algorithm in speculation.MODELS else None,
        "path": str(checkpoint.path),
        "files": [str(file) for file in checkpoint.files],
        "quantization": config.model.quantization,
        "stored": None if checkpoint.stored is None else asdict(checkpoint.stored),
        "consolidated": checkpoint.consolidated,
        "gguf": "" if checkpoint.gguf is None else str(checkpoint.gguf.path),
    }


def _scales(config: Config, checkpoint: Checkpoint, model: Model, kv_dtype: torch.dtype) -> dict[int, tuple[int, int]]:
    """How many scales the keys and the values of each layer have in a float8 cache."""
    read = config.cache.kv_cache_dtype == FP8 and checkpoint.kv_scheme in (None, FP8)
    if kv_dtype.itemsize > 1 or not read:
        return {}
    return {pool: (len(k), len(v)) for pool, (k, v) in stored_scales(model, checkpoint).items()}
