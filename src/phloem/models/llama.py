"""Llama 2 and 3.x, and what is built like them (SmolLM2, TinyLlama, Yi, ...)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from phloem.models._common import Decoder, usual

if TYPE_CHECKING:
    from phloem.layers.context import BuildContext


def build(config: dict[str, Any], ctx: BuildContext, max_positions: int) -> Decoder:
    return Decoder(ctx, usual(config), max_positions)
