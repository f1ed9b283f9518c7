"""Qwen3-VL: Qwen3 with places in time, height and width, and a tower whose middle layers its first ones get too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from phloem.layers.linear import Linear
from phloem.layers.weight import Layer
from phloem.models._common import usual, usual_layer
from phloem.models._qwen_vision import RENAMES, QwenTower, QwenVision
from phloem.models._vision import BlockKind, SeeingDecoder, vector

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from phloem.core.media import Media
    from phloem.layers.context import BuildContext, Pack
    from phloem.models._common import Decoder

VISION = {"processor": "qwen_vl", "image": "image_token_id", "video": "video_token_id"}
DEFAULTS = {"image_token_id": 151655, "video_token_id": 151656}
TINY = {
    "num_hidden_layers": 4,
    "rope_parameters": {
        "rope_type": "default", "mrope_section": [4, 2, 2], "mrope_interleaved": True, "rope_theta": 10000.0
    },
    "around": {
        "vision_config": {
            "depth": 3, "hidden_size": 32, "num_heads": 2, "intermediate_size": 48, "out_hidden_size": 32,
            "patch_size": 4, "num_position_embeddings": 36, "deepstack_visual_indexes": [0, 1],
        },
        "image_token_id": 6,
        "video_token_id": 7,
        "vision_start_token_id": 4,
        "vision_end_token_id": 5,
    },
}  # fmt: skip


@dataclass(frozen=True)
class MergerNames:
    """What checkpoints call the parts of mergers, and the list of the deep ones."""

    norm: str = "norm"
    up: str = "linear_fc1"
    down: str = "linear_fc2"
    several: str = "deepstack_merger_list"


class Merger(Layer):
    """Squares of patches to one embedding each. `behind`: the norm is of the whole square."""

    def __init__(
        self, ctx: BuildContext, kind: BlockKind, unit: int, out_size: int, names: MergerNames, *, behind: bool
    ) -> None:
        wide, self.ops, self.behind = kind.hidden_size * unit, ctx.ops, behind
        self.norm = kind.norm(ctx.child(names.norm), wide if behind else 0)
        self.up = Linear(ctx, wide, {names.up: wide}, bias=True)
        self.down = Linear(ctx, wide, {names.down: out_size}, bias=True)

    def __call__(self, x_TN: Tensor, unit: int) -> Tensor:
        wide = unit * x_TN.shape[1]
        x = self.norm(x_TN.reshape(-1, wide)) if self.behind else self.norm(x_TN).reshape(-1, wide)
        return self.down(self.ops.gelu(self.up(x)[0]))[0]


class DeepTower(QwenTower):
    """The deep parts of a picture's embeddings stand behind the first one: see `ForwardBatch.deep`."""

    def __init__(
        self,
        ctx: BuildContext,
        token: int,
        sizes: QwenVision,
        places: int,
        deep: Sequence[int],
        names: MergerNames,
    ) -> None:
        super().__init__(ctx, token, sizes)
        own, unit = ctx.child("visual"), sizes.merge**2
        self.deep, self.side = tuple(deep), round(places**0.5)
        self.parts = 1 + len(self.deep)
        self.table = vector(own, "pos_embed.weight", places, sizes.kind.hidden_size)
        size = unit, sizes.out_size, names
        self.merger = Merger(own.child("merger"), sizes.kind, *size, behind=False)
        several = own.child(names.several)
        self.deeper = [Merger(several.child(number), sizes.kind, *size, behind=True) for number in range(len(deep))]

    def joins(self, ctx: BuildContext) -> None:
        """The mergers are made above."""

    def encode(self, items: Sequence[Media], pack: Pack) -> list[Tensor]:
        unit = self.sizes.merge**2
        grids = [self.grid(item) for item in items]
        places = torch.cat([self._places(grid) for grid in grids])
        x_TN = self.embed(self.cast(torch.cat([self._patches(item) for item in items])))[0]
        learned = [self._learned(grid, self._places(grid)) for grid in grids]
        x_TN = x_TN + torch.cat(learned).to(x_TN.dtype)
        rotation = self._rotation(places)
        memory = pack([h * w * unit for t, h, w in grids for _ in range(t)])
        deeper: list[Tensor] = []
        for number, block in enumerate(self.blocks):
            x_TN = block(x_TN, memory, rotation)
            if number in self.deep:
                deeper.append(self.deeper[self.deep.index(number)](x_TN, unit))
        made = torch.cat([self.merger(x_TN, unit), *deeper], -1)
        return list(made.split([t * h * w for t, h, w in grids]))

    def _learned(self, grid: tuple[int, int, int], places_T2: Tensor) -> Tensor:
        """The table of positions, stretched over a picture's patches so that the corners meet."""
        table: Tensor = self.table.value
        low, high, share = [], [], []
        for axis, count in enumerate((grid[1] * self.sizes.merge, grid[2] * self.sizes.merge)):
            at = places_T2[:, axis].float() * ((self.side - 1) / max(1, count - 1))
            low.append(at.floor().long())
            high.append((low[-1] + 1).clamp(max=self.side - 1))
            share.append((at - low[-1])[:, None])
        corner = [[table[y * self.side + x] for x in (low[1], high[1])] for y in (low[0], high[0])]
        upper, lower = ((1 - share[1]) * left + share[1] * right for left, right in corner)
        return (1 - share[0]) * upper + share[0] * lower


def deep_tower(config: dict[str, Any], ctx: BuildContext, names: MergerNames | None = None) -> DeepTower:
    vision = config.get("vision_config") or {}
    size, inner = vision.get("hidden_size", 1152), vision.get("intermediate_size", 4304)
    act = vision.get("hidden_act", "gelu_pytorch_tanh")
    sizes = QwenVision(
        BlockKind(size, vision.get("num_heads", 16), inner, 1e-6, act, plain=("linear_fc1", "linear_fc2")),
        depth=vision.get("depth", 27),
        patch=vision.get("patch_size", 16),
        merge=vision.get("spatial_merge_size", 2),
        frames=vision.get("temporal_patch_size", 2),
        out_size=config["hidden_size"],
        bias=True,
    )
    deep = vision.get("deepstack_visual_indexes", (8, 16, 24))
    places = vision.get("num_position_embeddings", 2304)
    return DeepTower(ctx, config["image_token_id"], sizes, places, deep, names or MergerNames())


def build(config: dict[str, Any], ctx: BuildContext, max_positions: int) -> Decoder:
    layers = (usual_layer(config, qk_norm="head"),) * config["num_hidden_layers"]
    return SeeingDecoder(ctx, usual(config, layers=layers), max_positions, deep_tower(config, ctx), RENAMES)
