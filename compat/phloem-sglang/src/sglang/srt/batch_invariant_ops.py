"""Batch-invariant operators of the trainer's own torch: not here. The engine's: `enable_deterministic_inference`."""

from __future__ import annotations

from sglang._missing import missing, refuse


def enable_batch_invariant_mode(*_: object, **__: object) -> None:
    """Raises NotThere: Phloem does not replace operators of torch in the caller's process."""
    refuse("batch_invariant_ops.enable_batch_invariant_mode", "it would replace operators of the caller's own torch")


def is_batch_invariant_mode_enabled() -> bool:
    return False


__getattr__ = missing(__name__)
