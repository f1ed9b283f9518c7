"""Qwen3.5 with experts, the language model alone: Qwen3.5's layers with Qwen3-Next's sparse block in each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from phloem.models._common import Decoder
from phloem.models.qwen3_next import DEFAULTS as DEFAULTS
from phloem.models.qwen3_next import TINY as TINY
from phloem.models.qwen3_next import experts, hybrid

if TYPE_CHECKING:
    from phloem.layers.context import BuildContext


def build(config: dict[str, Any], ctx: BuildContext, max_positions: int) -> Decoder:
    sparse = experts(config)
    return hybrid(config, ctx, max_positions, lambda n: sparse, grouped=False)
