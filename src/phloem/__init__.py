"""Phloem: a serving engine for large language and multimodal models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from phloem.llm import LLM, Engine

__all__ = ["LLM", "Engine"]


def __getattr__(name: str) -> Any:
    """Import on first use: `phloem --help` needs none of it."""
    if name in __all__:
        from phloem import llm

        return getattr(llm, name)
    raise AttributeError(f"module 'phloem' has no attribute {name!r}")
