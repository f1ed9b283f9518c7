"""Dream 7B: Qwen2's layers whose tokens see the whole text, masks to its end included; it writes by diffusion.

As in the model that it was made from, the logits of a place stand at the one before it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from phloem.core.denoising import WHOLE
from phloem.core.errors import ModelLoadError
from phloem.models._common import Decoder, usual, usual_layer

if TYPE_CHECKING:
    from phloem.layers.context import BuildContext

DEFAULTS = {"block_size": 32, "mask_token_id": 151666}
GGUF = {
    "architecture": "dream",
    "hf_class": "DreamModel",
    "keys": {"is_causal": ("attention.causal", True)},
    "config": {"block_size": 32, "mask_token_id": 151666},  # the second unless the vocabulary names it
}
DIFFUSION = {"block": "block_size", "mask": "mask_token_id", "sees": "whole", "said": "before"}
TINY = {"mask_token_id": 2, "block_size": 8, "head_dim": None}


def build(config: dict[str, Any], ctx: BuildContext, max_positions: int) -> Decoder:
    if config.get("use_sliding_window"):
        raise ModelLoadError("use_sliding_window: a window is not served where tokens see the whole text")
    if config.get("is_causal"):
        raise ModelLoadError("attention.causal is not false: tokens of the model see the whole text")
    layer = usual_layer(config, block=WHOLE, qkv_bias=True, out_bias=False)
    return Decoder(ctx, usual(config, layers=(layer,) * config["num_hidden_layers"]), max_positions)
