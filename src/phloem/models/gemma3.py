"""Gemma 3 multimodal checkpoints, of which the language model is served; the image tower is left in the file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from phloem.models._common import Decoder
from phloem.models.gemma3_text import decoder_config

if TYPE_CHECKING:
    from phloem.layers.context import BuildContext


class Gemma3Language(Decoder):
    def checkpoint_name(self, name: str) -> str | None:
        if name.startswith(("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_")):
            return None
        return name.replace("model.language_model.", "model.", 1).removeprefix("language_model.")


def build(config: dict[str, Any], ctx: BuildContext, max_positions: int) -> Decoder:
    return Gemma3Language(ctx, decoder_config(config), max_positions)
