"""How a model's keys and values are kept, and what attends to them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from phloem import attention
from phloem.attention import AttentionNeed
from phloem.core import resolve
from phloem.core.denoising import WHOLE
from phloem.core.resolve import Decision
from phloem.engine.choices.dtypes import backend_names, kept_in, kv_scales_of, unasked

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from phloem.attention import AttentionBackend
    from phloem.checkpoint.describe import Checkpoint
    from phloem.core.config import Config
    from phloem.engine.ranks.machine import Machine
    from phloem.kernels.ops import Ops
    from phloem.models import Model
    from phloem.models._scales import LayerScales
    from phloem.platforms import Platform


@dataclass(frozen=True)
class Kept:
    """How a model's keys and values are kept, and what attends to them."""

    dtype: torch.dtype
    scales: Mapping[int, LayerScales]
    backend: AttentionBackend
    page: int

    def facts(self, checkpoint: Checkpoint, machine: Machine) -> dict[str, str]:
        """What all ranks must have alike."""
        return {
            "model type": checkpoint.model_type,
            "context length": str(checkpoint.context_length),
            "type of the KV cache": str(self.dtype),
            "attention backend": self.backend.name,
            "page size": str(self.page),
            "op table": machine.ops.name,
            "rows and tokens of a step": f"{machine.running}, {machine.chunk}",
        }


def kept(
    config: Config,
    checkpoint: Checkpoint,
    platform: Platform,
    ops: Ops,
    dtype: torch.dtype,
    model: Model,
    decisions: list[Decision],
) -> Kept:
    """`dtype`: in which the model computes. Raises ConfigError for what this machine cannot keep or attend to."""
    kv_dtype = unasked(config, checkpoint, model, platform, ops) or kept_in(config, dtype, model)
    scales = kv_scales_of(config, checkpoint, model, kv_dtype, decisions)
    # Of latents, what has written and read them knows; no backend does.
    width = max((len(scales[spec.pool][0]) for spec in model.attention_specs if spec.pool in scales), default=0)
    backend = _backend(choice_of(config, model, platform, ops, kv_dtype, width), decisions)
    block = max((spec.block for spec in model.attention_specs), default=0) % WHOLE
    page = resolve.page_size(config.cache.page_size, backend.name, backend.page_size, block)
    decisions.append(page)
    return Kept(kv_dtype, scales, backend, page.value)


def choice_of(
    config: Config, model: Model, platform: Platform, ops: Ops, kv_dtype: torch.dtype, width: int
) -> attention.Choice:
    """The attention backend: the named one, or the platform's first that accepts. `width`: scales that the keys of a
    layer have at most in a float8 cache; the model may be one without data.

    Raises:
        ConfigError: none accepts, or the named one does not.
    """
    need = AttentionNeed(model.attention_specs, kv_dtype, platform.device, config.cache.page_size, width)
    return attention.choose(backend_names(platform), need, ops, named=config.runtime.attention_backend)


def _backend(choice: attention.Choice, decisions: list[Decision]) -> AttentionBackend:
    """The chosen one, as a decision with the reasons of the others."""
    why = "; ".join([choice.reason, *(f"not {name}: {reason}" for name, reason in choice.declined.items())])
    decisions.append(Decision("attention_backend", choice.backend.name, why))
    return choice.backend
