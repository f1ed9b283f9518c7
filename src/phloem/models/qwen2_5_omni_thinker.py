"""Qwen2.5-Omni's thinker: Qwen2.5-VL that hears, by Whisper's encoder over pieces of a sound; it writes text alone."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from phloem.core.errors import ModelLoadError
from phloem.core.media import as_sound
from phloem.distributed.mesh import Mesh
from phloem.layers.linear import Linear
from phloem.models._common import each_layer, usual, usual_layer
from phloem.models._ears import Ears, EarsConfig, keys_without_bias
from phloem.models._qwen_vision import RENAMES, QwenTower
from phloem.models._vision import SeeingDecoder, VisionTower
from phloem.models.qwen2 import windows
from phloem.models.qwen2_5_vl import vision_sizes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from phloem.core.media import Media
    from phloem.layers.context import BuildContext, Pack
    from phloem.models._common import Decoder

VISION = {
    "processor": "qwen_omni",
    "image": "image_token_id",
    "video": "video_token_id",
    "audio": "audio_token_id",
}
SPELLING = {
    "image_token_id": "image_token_index",
    "video_token_id": "video_token_index",
    "audio_token_id": "audio_token_index",
}
DEFAULTS = {
    "image_token_id": 151655, "video_token_id": 151656, "audio_token_id": 151646, "vision_start_token_id": 151652,
    "vision_end_token_id": 151653, "audio_start_token_id": 151647, "audio_end_token_id": 151648,
    "position_id_per_seconds": 25,
}  # fmt: skip
TINY = {
    "head_dim": None,
    "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0},
    "around": {
        "vision_config": {
            "depth": 3, "hidden_size": 32, "num_heads": 2, "intermediate_size": 48, "out_hidden_size": 32,
            "patch_size": 4, "window_size": 16, "fullatt_block_indexes": [1],
        },
        "audio_config": {
            "d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 48,
            "num_mel_bins": 16, "max_source_positions": 50, "n_window": 10, "output_dim": 32,
        },
        "position_id_per_seconds": 3,
        "image_token_index": 6,
        "video_token_index": 7,
        "audio_token_index": 8,
        "vision_start_token_id": 4,
        "vision_end_token_id": 5,
        "audio_start_token_id": 13,
        "audio_end_token_id": 14,
    },
}  # fmt: skip
_EPS = 1e-5


class OmniTower(VisionTower):
    """Two towers."""

    turns = True

    def __init__(self, ctx: BuildContext, config: dict[str, Any]) -> None:
        super().__init__(ctx, config["image_token_id"], config["hidden_size"])
        self.visual = QwenTower(ctx, config["image_token_id"], vision_sizes(config, ("q", "k", "v")))
        audio: dict[str, Any] = config.get("audio_config") or {}
        size, half = audio.get("d_model", 1280), audio.get("n_window", 100)
        if half % 2 or audio.get("scale_embedding"):
            raise ModelLoadError("audio_config: pieces of whole tokens are served, whose embeddings are not scaled")
        self.audio_token, self.piece = int(config["audio_token_id"]), 2 * half
        sizes = EarsConfig(
            bands=audio.get("num_mel_bins", 128),
            states=audio.get("max_source_positions", 1500),
            hidden_size=size,
            inner_size=audio.get("encoder_ffn_dim", 5120),
            layers=audio.get("encoder_layers", 32),
            heads=audio.get("encoder_attention_heads", 20),
            activation=audio.get("activation_function", "gelu"),
            eps=_EPS,
            pool=2,
            norm="ln_post",
            learned=False,
        )
        own = ctx.child("audio_tower")
        self.ears = Ears(replace(own, mesh=Mesh()), sizes)
        keys_without_bias(self.ears.weights())
        self.projector = Linear(own, size, {"proj": config["hidden_size"]}, bias=True)

    def encode(self, items: Sequence[Media], pack: Pack) -> list[Tensor]:
        self.visual.like = self.like
        heard = [item for item in items if item.token == self.audio_token]
        seen = [item for item in items if item.token != self.audio_token]
        made = iter(self.visual.encode(seen, pack) if seen else [])
        told = iter(self._heard(heard, pack) if heard else [])
        return [next(told if item.token == self.audio_token else made) for item in items]

    def settle(self) -> None:
        self.ears.settle()

    def _heard(self, items: Sequence[Media], pack: Pack) -> list[Tensor]:
        """Each piece by itself, with places of its own."""
        mels = [torch.from_numpy(as_sound(item)[0].copy()).to(self.device) for item in items]
        pieces = [piece for mel in mels for piece in mel.split(self.piece, 1)]
        return list(self.projector(self.ears(pieces, pack))[0].split([item.count for item in items]))


class Thinker(SeeingDecoder):
    def __init__(self, ctx: BuildContext, config: dict[str, Any], max_positions: int) -> None:
        sizes = windows(config)
        layers = each_layer(config, lambda n: usual_layer(config, window=sizes[n], qkv_bias=True, out_bias=False))
        renames = {"model.audio_tower.": "audio_tower.", **RENAMES}
        super().__init__(ctx, usual(config, layers=layers), max_positions, OmniTower(ctx, config), renames)

    def checkpoint_name(self, name: str) -> str | None:
        """Without what makes speech, and embeddings that the thinker reads from its own table."""
        if name.startswith(("talker.", "token2wav.")) or ".audio_bos_eos_token." in name:
            return None
        return super().checkpoint_name(name.removeprefix("thinker."))


def build(config: dict[str, Any], ctx: BuildContext, max_positions: int) -> Decoder:
    return Thinker(ctx, config, max_positions)
