"""Qwen3-Omni's thinker: Qwen3-VL with experts that hears, a second of sound at a time; it writes text alone."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

from phloem.core.errors import ModelLoadError
from phloem.core.media import as_sound
from phloem.distributed.mesh import Mesh
from phloem.layers.context import ForwardBatch
from phloem.layers.linear import Linear
from phloem.layers.moe import softmax_experts
from phloem.layers.weight import Layer
from phloem.models._common import each_layer, usual, usual_attention, usual_mlp
from phloem.models._ears import ear_layers, sines
from phloem.models._layer import Experts, LayerKind, Place
from phloem.models._qwen_vision import RENAMES
from phloem.models._vision import SeeingDecoder, VisionTower, vector
from phloem.models.qwen3_vl import MergerNames, deep_tower

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from phloem.core.media import Media
    from phloem.layers.context import BuildContext, Pack
    from phloem.models._common import Decoder

VISION = {"processor": "qwen_omni", "image": "image_token_id", "video": "video_token_id", "audio": "audio_token_id"}
DEFAULTS = {
    "image_token_id": 151655, "video_token_id": 151656, "audio_token_id": 151675, "vision_start_token_id": 151652,
    "vision_end_token_id": 151653, "audio_start_token_id": 151669, "audio_end_token_id": 151670,
    "position_id_per_seconds": 13, "norm_topk_prob": True,
}  # fmt: skip
TINY = {
    "num_hidden_layers": 4,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "mlp_only_layers": [1],
    "rope_parameters": {
        "rope_type": "default", "mrope_section": [2, 1, 1], "mrope_interleaved": True, "rope_theta": 10000.0
    },
    "around": {
        "vision_config": {
            "depth": 3, "hidden_size": 32, "num_heads": 2, "intermediate_size": 48, "out_hidden_size": 32,
            "patch_size": 4, "num_position_embeddings": 36, "deepstack_visual_indexes": [0, 1],
        },
        "audio_config": {
            "d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 48,
            "num_mel_bins": 16, "max_source_positions": 50, "n_window": 50, "n_window_infer": 200, "output_dim": 32,
            "downsample_hidden_size": 8,
        },
        "position_id_per_seconds": 4,
        "image_token_id": 6,
        "video_token_id": 7,
        "audio_token_id": 8,
        "vision_start_token_id": 4,
        "vision_end_token_id": 5,
        "audio_start_token_id": 13,
        "audio_end_token_id": 14,
    },
}  # fmt: skip

_PIECE, _TOKENS = 100, 13  # frames that are convolved together, and what becomes of them
_EPS = 1e-5
_NAMES = MergerNames("ln_q", "mlp.0", "mlp.2", "merger_list")
_SPEECH = ("talker.", "code2wav.")  # what makes speech


class PiecedEars(Layer):
    """Three convolutions over frames and bands of each second by itself, then layers that see some seconds.

    Legend: F frames, B bands, n pieces, T tokens, N hidden size.
    """

    def __init__(self, ctx: BuildContext, audio: dict[str, Any], out_size: int) -> None:
        self.ops, self.size = ctx.ops, int(audio.get("d_model", 1280))
        wide, bands = int(audio.get("downsample_hidden_size", 480)), int(audio.get("num_mel_bins", 128))
        if 2 * int(audio.get("n_window", 50)) != _PIECE or audio.get("scale_embedding"):
            raise ModelLoadError(f"audio_config: pieces of {_PIECE} frames are served, whose embeddings are not scaled")
        self.seconds = int(audio.get("n_window_infer", 800)) // _PIECE  # that see each other
        if self.seconds < 1:
            raise ModelLoadError("audio_config: n_window_infer is less than a piece")
        self.kernels = [
            (vector(ctx, f"conv2d{number}.weight", wide, inputs, 3, 3), vector(ctx, f"conv2d{number}.bias", wide))
            for number, inputs in ((1, 1), (2, wide), (3, wide))
        ]
        left = bands
        for _ in self.kernels:
            left = (left + 1) // 2
        self.join = Linear(ctx, wide * left, {"conv_out": self.size})
        place = Place(self.size, _EPS, 0.0, int(audio.get("max_source_positions", 1500)), norms="layer")
        feed = audio.get("encoder_ffn_dim", 5120), audio.get("activation_function", "gelu")
        layers, heads = audio.get("encoder_layers", 32), audio.get("encoder_attention_heads", 20)
        self.layers = ear_layers(ctx, place, layers, heads, feed)
        self.norm = place.norm(ctx.child("ln_post"))
        self.up = Linear(ctx, self.size, {"proj1": self.size}, bias=True)
        self.down = Linear(ctx, self.size, {"proj2": out_size}, bias=True)

    def __call__(self, mels_BF: Sequence[Tensor], counts: Sequence[int], pack: Pack, dtype: torch.dtype) -> Tensor:
        """[T, the model's hidden size]; `counts`: the tokens of each sound."""
        x_TN = torch.cat([self._tokens(mel_BF, count, dtype) for mel_BF, count in zip(mels_BF, counts, strict=True)])
        window = self.seconds * _TOKENS
        lengths = [min(window, count - at) for count in counts for at in range(0, count, window)]
        nothing, residual_TN = torch.zeros(0, dtype=torch.int64, device=x_TN.device), None
        step = ForwardBatch(nothing, nothing, pack(lengths), None)
        for layer in self.layers:
            x_TN, residual_TN = layer.attend(x_TN, residual_TN, step)
            x_TN, residual_TN = layer.feed(x_TN, residual_TN)
        x_TN = self.norm.add(x_TN, residual_TN)[0]
        return self.down(self.ops.gelu(self.up(x_TN)[0]))[0]

    def _tokens(self, mel_BF: Tensor, count: int, dtype: torch.dtype) -> Tensor:
        """[count, N] of one sound. Its last piece is as long as the others, with zeros behind."""
        length = min(_PIECE, mel_BF.shape[1])
        short = -mel_BF.shape[1] % length
        x = F.pad(mel_BF, (0, short)).unflatten(1, (-1, length)).transpose(0, 1)[:, None]  # [n, 1, B, F]
        for weight, bias in self.kernels:
            x = F.gelu(F.conv2d(x, weight.value, bias.value, stride=2, padding=1))
        flat_TN = x.permute(0, 3, 1, 2).flatten(2)  # [n, tokens, channels x bands]
        places = sines(self.size, flat_TN.shape[1]).to(x.device)
        joined = self.join(flat_TN.flatten(0, 1).to(dtype).contiguous())[0].unflatten(0, flat_TN.shape[:2])
        return (joined + places.to(dtype)).flatten(0, 1)[:count]


class OmniTower(VisionTower):
    """Two towers. Of pictures' embeddings there are deep parts; those of sounds are zeros."""

    turns = True

    def __init__(self, ctx: BuildContext, config: dict[str, Any]) -> None:
        super().__init__(ctx, config["image_token_id"], config["hidden_size"])
        self.visual = deep_tower(config, ctx, _NAMES)
        self.parts = self.visual.parts
        self.audio_token = int(config["audio_token_id"])
        own = replace(ctx.child("audio_tower"), mesh=Mesh())
        self.ears = PiecedEars(own, config.get("audio_config") or {}, config["hidden_size"])

    def encode(self, items: Sequence[Media], pack: Pack) -> list[Tensor]:
        self.visual.like = self.like
        heard = [item for item in items if item.token == self.audio_token]
        seen = [item for item in items if item.token != self.audio_token]
        made = iter(self.visual.encode(seen, pack) if seen else [])
        told = iter(self._heard(heard, pack) if heard else [])
        return [next(told if item.token == self.audio_token else made) for item in items]

    def _heard(self, items: Sequence[Media], pack: Pack) -> list[Tensor]:
        mels = [torch.from_numpy(as_sound(item)[0].copy()).to(self.device) for item in items]
        counts = [item.count for item in items]
        x_TN = self.ears(mels, counts, pack, self.like or torch.float32)
        return list(F.pad(x_TN, (0, len(self.visual.deep) * x_TN.shape[1])).split(counts))


class Thinker(SeeingDecoder):
    def checkpoint_name(self, name: str) -> str | None:
        return None if name.startswith(_SPEECH) else super().checkpoint_name(name.removeprefix("thinker."))


def build(config: dict[str, Any], ctx: BuildContext, max_positions: int) -> Decoder:
    experts = softmax_experts(
        count=config["num_experts"],
        per_token=config["num_experts_per_tok"],
        inner_size=config["moe_intermediate_size"],
        activation=config.get("hidden_act", "silu"),
        renormalise=bool(config["norm_topk_prob"]),
    )
    step, dense = int(config.get("decoder_sparse_step", 1)), config.get("mlp_only_layers") or []

    def layer(n: int) -> LayerKind:
        sparse = (n + 1) % step == 0 and n not in dense
        return LayerKind(usual_attention(config, qk_norm="head"), Experts(experts) if sparse else usual_mlp(config))

    renames = {"model.audio_tower.": "audio_tower.", **RENAMES}
    layers = each_layer(config, layer)
    return Thinker(ctx, usual(config, layers=layers), max_positions, OmniTower(ctx, config), renames)
