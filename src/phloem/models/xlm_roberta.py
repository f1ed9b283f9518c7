"""XLM-RoBERTa: RoBERTa in many languages."""

from __future__ import annotations

from phloem.models.roberta import DEFAULTS, ENCODER, GGUF_FAMILY, TINY, VARIANTS, build

__all__ = ["DEFAULTS", "ENCODER", "GGUF_FAMILY", "TINY", "VARIANTS", "build"]
