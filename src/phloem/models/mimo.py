"""MiMo-7B: Qwen2 with a layer behind the last one that drafts (`speculation/drafters/mtp.py`)."""

from __future__ import annotations

from phloem.models.qwen2 import build

__all__ = ["build"]
