"""Qwen2-Audio: Whisper's encoder, of whose states two become one, a matrix, and Qwen2."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from phloem.core.errors import ModelLoadError
from phloem.core.media import as_sound
from phloem.distributed.mesh import Mesh
from phloem.layers.linear import Linear
from phloem.models._ears import Ears, EarsConfig, keys_without_bias
from phloem.models._vision import SeeingDecoder, VisionTower
from phloem.models._vit import RENAMES, text_decoder

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from phloem.core.media import Media
    from phloem.layers.context import BuildContext, Pack
    from phloem.models._common import Decoder

VISION = {"processor": "qwen2_audio", "audio": "audio_token_id"}
SPELLING = {"audio_token_id": "audio_token_index"}
# Published files leave out what is Qwen2's default.
DEFAULTS = {
    "audio_token_id": 151646, "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 32, "intermediate_size": 22016, "vocab_size": 151936, "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
}  # fmt: skip
TINY = {
    "model_type": "qwen2",
    "head_dim": None,
    "around": {
        "audio_config": {
            "model_type": "qwen2_audio_encoder", "d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 2,
            "encoder_ffn_dim": 48, "num_mel_bins": 16, "max_source_positions": 50,
        },
        "audio_token_index": 8,
    },
}  # fmt: skip
_EPS = 1e-5


class Hearing(VisionTower):
    def __init__(self, ctx: BuildContext, config: dict[str, Any]) -> None:
        super().__init__(ctx, config["audio_token_id"], config["hidden_size"])
        audio: dict[str, Any] = config.get("audio_config") or {}
        if audio.get("scale_embedding"):
            raise ModelLoadError("audio_config.scale_embedding: the encoder's embeddings are not scaled")
        size = audio.get("d_model", 1280)
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
        )
        # Every rank has the whole tower: it runs once a sound.
        self.ears = Ears(replace(ctx.child("audio_tower"), mesh=Mesh()), sizes)
        keys_without_bias(self.ears.weights())
        self.projector = Linear(ctx.child("multi_modal_projector"), size, {"linear": config["hidden_size"]}, bias=True)

    def encode(self, items: Sequence[Media], pack: Pack) -> list[Tensor]:
        mels = [torch.from_numpy(as_sound(item)[0].copy()).to(self.device) for item in items]
        states = self.ears(mels, pack, [item.extra[0] for item in items])
        return list(self.projector(states)[0].split([item.count for item in items]))

    def settle(self) -> None:
        self.ears.settle()


def build(config: dict[str, Any], ctx: BuildContext, max_positions: int) -> Decoder:
    renames = {"model.audio_tower.": "audio_tower.", **RENAMES}
    return SeeingDecoder(ctx, text_decoder(config), max_positions, Hearing(ctx, config), renames)
