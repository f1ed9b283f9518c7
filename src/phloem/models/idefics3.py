"""Idefics3: as SmolVLM, which followed it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from phloem.models import smolvlm
from phloem.models.smolvlm import DEFAULTS as DEFAULTS
from phloem.models.smolvlm import TINY as TINY

if TYPE_CHECKING:
    from phloem.layers.context import BuildContext
    from phloem.models._common import Decoder

VISION = {"processor": "idefics3", "image": "image_token_id"}


def build(config: dict[str, Any], ctx: BuildContext, max_positions: int) -> Decoder:
    return smolvlm.build(config, ctx, max_positions)
