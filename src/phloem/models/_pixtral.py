"""Pixtral's tower: pictures of any size, turned by row and column."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from phloem.kernels.ops import Rotation
from phloem.layers.linear import Linear
from phloem.layers.norm import RMSNorm
from phloem.models._vision import Block, BlockKind, VisionTower, patches
from phloem.models._vit import Projector

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from phloem.core.media import Media
    from phloem.layers.context import BuildContext, Pack

EPS = 1e-5


class PixtralTower(VisionTower):
    """With `merge` squares of patches become one token, behind a norm (Mistral 3)."""

    def __init__(self, ctx: BuildContext, config: dict[str, Any], vision: dict[str, Any], merge: int = 1) -> None:
        super().__init__(ctx, config["image_token_id"], config["hidden_size"])
        size, heads = vision.get("hidden_size", 1024), vision.get("num_attention_heads", 16)
        kind = BlockKind(
            size, heads, vision.get("intermediate_size", 4096), EPS, vision.get("hidden_act", "gelu"), rms=True,
            gated=True, bias=False, norms=("attention_norm", "ffn_norm"), attention="attention",
            qkv=("q_proj", "k_proj", "v_proj"), qkv_bias=False, out="o_proj", mlp="feed_forward",
        )  # fmt: skip
        own = ctx.child("vision_tower")
        self.patch, self.merge, self.head = vision.get("patch_size", 16), merge, size // heads
        rope = vision.get("rope_parameters") or {}
        self.base = float(rope.get("rope_theta", vision.get("rope_theta", 10000.0)))
        self.embed = Linear(own, 3 * self.patch**2, {"patch_conv": size})
        self.before = kind.norm(own.child("ln_pre"))
        layers = own.child("transformer").child("layers")
        self.blocks = [Block(layers.child(number), kind) for number in range(vision.get("num_hidden_layers", 24))]
        join = ctx.child("multi_modal_projector")
        self.norm = self.merging = None
        if merge > 1:
            self.norm = RMSNorm(join.child("norm"), size, float(config.get("rms_norm_eps", 1e-6)))
            self.merging = Linear(join.child("patch_merger"), size * merge**2, {"merging_layer": size})
        self.projector = Projector(
            join, size, config["hidden_size"], bias=bool(config.get("multimodal_projector_bias", merge == 1))
        )

    def encode(self, items: Sequence[Media], pack: Pack) -> list[Tensor]:
        grids = [(item.shape[1] // self.patch, item.shape[2] // self.patch) for item in items]
        cut = [patches(self.pixels(item), self.patch, self.merge)[0].flatten(1) for item in items]
        x_TN = self.before(self.embed(self.cast(torch.cat(cut)))[0])
        rotation = self._rotation(torch.cat([self._places(*grid) for grid in grids]))
        memory = pack([height * width for height, width in grids])
        for block in self.blocks:
            x_TN = block(x_TN, memory, rotation)
        unit = self.merge**2
        if self.norm is not None and self.merging is not None:
            # A kernel of a convolution reads the patches of a square channel by channel.
            x_TN = self.merging(self.norm(x_TN).unflatten(0, (-1, unit)).transpose(1, 2).flatten(1))[0]
        return list(self.projector(x_TN).split([height * width // unit for height, width in grids]))

    def _places(self, height: int, width: int) -> Tensor:
        """Row and column of every patch [T, 2], square by square."""
        merge = self.merge
        at = np.indices((height, width)).reshape(2, height // merge, merge, width // merge, merge)
        return torch.from_numpy(at.transpose(0, 1, 3, 2, 4).reshape(2, -1).T.copy()).to(self.device)

    def _rotation(self, places_T2: Tensor) -> Rotation:
        slow = 1.0 / self.base ** (torch.arange(0, self.head, 2, dtype=torch.float32, device=self.device) / self.head)
        rows, columns = places_T2[:, :1].float() * slow[0::2], places_T2[:, 1:].float() * slow[1::2]
        angles = torch.cat([rows, columns], -1)
        table = torch.stack([angles.cos(), angles.sin()], 1).contiguous()
        return Rotation(torch.arange(len(table), device=self.device), table, False)
