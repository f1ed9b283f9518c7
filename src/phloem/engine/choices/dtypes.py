"""In which types a model computes, and in which it keeps keys and values."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from phloem import attention
from phloem.attention import AttentionNeed
from phloem.checkpoint.families import audio_of
from phloem.checkpoint.kv_scheme import FP8
from phloem.core.errors import ConfigError
from phloem.core.memory import Latent
from phloem.core.resolve import Decision
from phloem.kernels.ops import Ops
from phloem.models import Conditioned
from phloem.models._common import Decoder
from phloem.models._scales import read_kv_scales, scaled_pools, scales_of
from phloem.platforms._facts import own_float8
from phloem.utils import log

if TYPE_CHECKING:
    from phloem.checkpoint.describe import Checkpoint
    from phloem.core.config import Config
    from phloem.models import Model, Tower
    from phloem.models._scales import LayerScales
    from phloem.platforms import Platform

_log = log.get("engine")


def tower_of(model: Model) -> Tower | None:
    return model.tower if isinstance(model, Decoder) else None


def backend_names(platform: Platform) -> list[str]:
    known = attention.BACKENDS.names()
    return attention.with_others([name for name in platform.attention_backends() if name in known])


def dtype_of(config: Config, checkpoint: Checkpoint, platform: Platform, decisions: list[Decision]) -> torch.dtype:
    if config.model.dtype != "auto":
        dtype, why = getattr(torch, config.model.dtype), "as asked"
    else:
        dtype, why = platform.dtype(checkpoint.config.get("dtype"))
    decisions.append(Decision("dtype", str(dtype).removeprefix("torch."), why))
    return dtype


_KV_DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "int8": torch.int8,
    "fp8_e4m3": torch.float8_e4m3fn,
}


def kv_dtype_of(config: Config, dtype: torch.dtype) -> torch.dtype:
    name = config.cache.kv_cache_dtype
    if name == "auto":
        return dtype
    if name not in _KV_DTYPES:
        raise ConfigError(
            f"kv_cache_dtype: {name!r} is not one of auto, {', '.join(_KV_DTYPES)}", param="kv_cache_dtype"
        )
    # The device's own kind of float8.
    return own_float8() if name == FP8 else _KV_DTYPES[name]


def kept_in(config: Config, dtype: torch.dtype, model: Model) -> torch.dtype:
    """The type of keys and values. Raises ConfigError for one that the model's pictures cannot be attended to in."""
    kind, tower = kv_dtype_of(config, dtype), tower_of(model)
    if isinstance(model, Conditioned) and kind.itemsize == 1:
        why = "the tokens of this model's canvases see each other both ways, in 16 bits or more"
        raise ConfigError(f"kv_cache_dtype: {why}", param="kv_cache_dtype")
    if tower is not None and tower.whole and kind.itemsize == 1:
        why = "the tokens of this model's pictures see each other both ways, in 16 bits or more"
        raise ConfigError(f"kv_cache_dtype: {why}", param="kv_cache_dtype")
    return kind


def eight_bits(
    config: Config, checkpoint: Checkpoint, model: Model, platform: Platform, ops: Ops
) -> torch.dtype | None:
    """The type that keeps keys and values in 8 bits unasked: where the weights have about as few, nobody has named a
    type, and the platform's attention computes on such a cache, faster and in half the memory."""
    few = config.model.quantization is not None or checkpoint.quantised
    asked = config.cache.kv_cache_dtype != "auto" or config.model.dtype != "auto"
    kind = platform.quantised_kv_dtype
    tower = tower_of(model)
    if isinstance(model, Conditioned) or (tower is not None and tower.whole):
        return None  # its pictures' or canvases' attention reads keys and values as they are
    if kind is None or asked or not few or any(isinstance(spec, Latent) for spec in model.memory):
        return None
    need = AttentionNeed(model.attention_specs, kind, platform.device, config.cache.page_size)
    try:
        attention.choose(backend_names(platform), need, ops, named=config.runtime.attention_backend)
    except ConfigError:
        return None
    return kind


def heard(config: Config, checkpoint: Checkpoint, ops: Ops) -> torch.dtype | None:
    """The type that keeps what a model hears, where nobody has named one and the table's attention keeps few types:
    most of what its steps read is there."""
    asked = config.cache.kv_cache_dtype != "auto" or config.model.dtype != "auto"
    if asked or audio_of(checkpoint.model_type) is None or ops.kv_dtypes is None:
        return None
    return next((kind for kind in ops.kv_dtypes if kind.is_floating_point), None)


def latents(config: Config, model: Model, ops: Ops) -> torch.dtype | None:
    """The type that keeps latents, where nobody has named one: kernels of a table that says what it keeps read them in
    bfloat16 alone, and whatever else they lie in is left to the reference."""
    asked = config.cache.kv_cache_dtype != "auto" or config.model.dtype != "auto"
    if asked or ops.kv_dtypes is None or not any(isinstance(spec, Latent) for spec in model.memory):
        return None
    return torch.bfloat16


def unasked(config: Config, checkpoint: Checkpoint, model: Model, platform: Platform, ops: Ops) -> torch.dtype | None:
    """The type of keys and values where it is another than the model's though nobody has asked for one."""
    eight = eight_bits(config, checkpoint, model, platform, ops)
    return eight or heard(config, checkpoint, ops) or latents(config, model, ops)


def kv_scales_of(
    config: Config, checkpoint: Checkpoint, model: Model, kv_dtype: torch.dtype, decisions: list[Decision]
) -> dict[int, LayerScales]:
    """The checkpoint's scales where the KV cache is float8; layers without any keep their values as they are."""
    name, asked = str(kv_dtype).removeprefix("torch."), config.cache.kv_cache_dtype
    if asked != FP8:
        eight = kv_dtype.itemsize == 1 and asked == "auto"
        why = "as the weights are quantised" if eight else "the type of the model" if asked == "auto" else "as asked"
        if asked == "auto" and not eight and audio_of(checkpoint.model_type) is not None:
            why = (
                "the type of the model, or what the table's attention reads: most of a step's reading is what is heard"
            )
        elif asked == "auto" and not eight and any(isinstance(spec, Latent) for spec in model.memory):
            why = "the type of the model, or what the table's attention reads latents in"
        if checkpoint.kv_scheme == FP8:
            why += f"; the checkpoint brings scales for {FP8}, which --kv-cache-dtype {FP8} uses"
        decisions.append(Decision("kv_cache_dtype", name, why))
        return {}
    layers = sum(scales_of(spec) > 0 for spec in model.memory)
    other = checkpoint.kv_scheme not in (None, FP8)
    scales = {} if other else stored_scales(model, checkpoint)
    if other:
        _log.warning(
            "the checkpoint's scales are for a KV cache of type %s: not used for %s", checkpoint.kv_scheme, FP8
        )
    if len(scales) < layers:
        _log.warning(
            "KV cache in %s: no k_scale and v_scale for %d of %d layers, 1.0 stands in for them: keys and values "
            "beyond %g are cut off",
            *(FP8, layers - len(scales), layers, torch.finfo(kv_dtype).max),
        )
    if kv_dtype == torch.float8_e4m3fnuz:
        # Scales are made for a largest value of 448; this type ends at 240.
        scales = {layer: (tuple(x * 2 for x in k), tuple(x * 2 for x in v)) for layer, (k, v) in scales.items()}
    why = f"as asked; scales from the checkpoint for {len(scales)} of {layers} layers"
    decisions.append(Decision("kv_cache_dtype", name, why))
    return scales


def stored_scales(model: Model, checkpoint: Checkpoint) -> dict[int, LayerScales]:
    """The checkpoint's scales for a float8 KV cache, by pool index. Raises ModelLoadError for one that cannot be."""
    layers = model.pools if isinstance(model, Decoder) else [range(n, n + 1) for n in range(len(model.memory))]
    return read_kv_scales(checkpoint, model.memory, scaled_pools(model.memory, layers), model.checkpoint_name)
