"""GLM-4.1V: GLM-4-0414 with places in time, height and width, and a tower with learned positions that are stretched."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import grid_sample

from phloem.distributed.mesh import Mesh
from phloem.layers.linear import Linear
from phloem.layers.mlp import GatedMLP
from phloem.layers.norm import LayerNorm
from phloem.layers.rope import rope_spec
from phloem.models._common import each_layer, usual, usual_attention, usual_mlp
from phloem.models._layer import LayerKind
from phloem.models._qwen_vision import RENAMES, QwenTower, QwenVision
from phloem.models._vision import BlockKind, SeeingDecoder, vector

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from phloem.core.media import Media
    from phloem.layers.context import BuildContext, Pack
    from phloem.models._common import Decoder

# A video's frames are pictures with the second behind each.
VISION = {"processor": "glm4v", "image": "image_token_id", "video": "image_token_id"}
DEFAULTS = {
    "image_token_id": 151343, "image_start_token_id": 151339, "image_end_token_id": 151340, "video_token_id": 151344,
    "video_start_token_id": 151341, "video_end_token_id": 151342,
}  # fmt: skip
TINY = {
    "hidden_size": 64,
    "head_dim": None,
    "rope_parameters": {
        "rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0, "partial_rotary_factor": 0.5
    },
    "around": {
        "vision_config": {
            "depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 48, "out_hidden_size": 64,
            "patch_size": 4, "image_size": 24,
        },
        "image_token_id": 6,
        "image_start_token_id": 4,
        "image_end_token_id": 5,
        "video_token_id": 7,
        "video_start_token_id": 4,
        "video_end_token_id": 5,
    },
}  # fmt: skip
_NORMS = ("input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm")


class GlmTower(QwenTower):
    """Squares of patches become one by a matrix, then pass a gated block."""

    def __init__(self, ctx: BuildContext, token: int, sizes: QwenVision, places: int, wide: int, act: str) -> None:
        super().__init__(ctx, token, sizes)
        own, kind, out = ctx.child("visual"), sizes.kind, sizes.out_size
        self.before, self.after = (kind.norm(own.child(f"post_{name}layernorm")) for name in ("conv_", ""))
        self.side = round(places**0.5)
        self.table = vector(own.child("embeddings"), "position_embedding.weight", places, kind.hidden_size)
        self.joined = Linear(own, kind.hidden_size * sizes.merge**2, {"downsample": out}, bias=True)
        merger = own.child("merger")
        self.mixed = Linear(merger, out, {"proj": out})
        self.norm = LayerNorm(merger.child("post_projection_norm"), out, 1e-5)
        self.gated = GatedMLP(replace(merger, mesh=Mesh()), out, wide, act)

    def joins(self, ctx: BuildContext) -> None:
        """Made above."""

    def encode(self, items: Sequence[Media], pack: Pack) -> list[Tensor]:
        unit = self.sizes.merge**2
        grids = [self.grid(item) for item in items]
        places = [self._places(grid) for grid in grids]
        x_TN = self.before(self.embed(self.cast(torch.cat([self._patches(item) for item in items])))[0])
        learned = [self._learned(grid, each) for grid, each in zip(grids, places, strict=True)]
        x_TN = x_TN + torch.cat(learned).to(x_TN.dtype)
        rotation = self._rotation(torch.cat(places))
        memory = pack([h * w * unit for t, h, w in grids for _ in range(t)])
        for block in self.blocks:
            x_TN = block(x_TN, memory, rotation)
        # A kernel of a convolution reads the patches of a square channel by channel.
        squares = self.after(x_TN).unflatten(0, (-1, unit)).transpose(1, 2).flatten(1)
        x_TN = self.ops.gelu(self.norm(self.mixed(self.joined(squares)[0])[0]))
        made = self.gated(None, x_TN, None, add=False)[0]
        return list(made.split([t * h * w for t, h, w in grids]))

    def _learned(self, grid: tuple[int, int, int], places_T2: Tensor) -> Tensor:
        """The table of positions, stretched over a picture's patches, by bicubic interpolation."""
        table = self.table.value.view(1, self.side, self.side, -1).permute(0, 3, 1, 2)
        counts = torch.tensor(grid[1:], device=places_T2.device) * self.sizes.merge
        at = ((places_T2 + 0.5) / counts * 2 - 1).flip(1)[None, :, None]
        found = grid_sample(table, at, mode="bicubic", padding_mode="border", align_corners=False)
        return found[0, :, :, 0].T


def glm_tower(config: dict[str, Any], ctx: BuildContext) -> GlmTower:
    vision = config.get("vision_config") or {}
    size, out, act = vision.get("hidden_size", 1536), config["hidden_size"], vision.get("hidden_act", "silu")
    patch, eps = vision.get("patch_size", 14), float(vision.get("rms_norm_eps", 1e-5))
    kind = BlockKind(
        size, vision.get("num_heads", 12), out, eps, act, rms=True, gated=True, bias=False,
        qkv_bias=bool(vision.get("attention_bias", False)),
    )  # fmt: skip
    sizes = QwenVision(
        kind,
        depth=vision.get("depth", 24),
        patch=patch,
        merge=vision.get("spatial_merge_size", 2),
        frames=vision.get("temporal_patch_size", 2),
        out_size=out,
        bias=True,
    )
    places = (vision.get("image_size", 336) // patch) ** 2
    return GlmTower(ctx, config["image_token_id"], sizes, places, vision.get("intermediate_size", 13696), act)


def build(config: dict[str, Any], ctx: BuildContext, max_positions: int) -> Decoder:
    head = config["hidden_size"] // config["num_attention_heads"]
    rope = rope_spec(config, head, interleaved=True)
    attention = usual_attention({**config, "head_dim": head}, rope=rope, qkv_bias=True, out_bias=False)
    kind = LayerKind(attention, usual_mlp(config, fused="gate_up_proj"), norms="sandwich", norm_names=_NORMS)
    layers = each_layer(config, lambda n: kind)
    return SeeingDecoder(ctx, usual(config, layers=layers), max_positions, glm_tower(config, ctx), RENAMES)
