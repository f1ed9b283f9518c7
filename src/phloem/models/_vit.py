"""Towers for pictures of one size: a transformer over patches with learned positions, and what joins it to a model.

Legend: B pictures or tiles, T patches of one (with the class, where there is one), N the tower's hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from phloem.core.errors import ModelLoadError
from phloem.layers.linear import Linear
from phloem.layers.weight import Layer
from phloem.models import ministral3
from phloem.models._common import DecoderConfig, each_layer, usual, usual_layer
from phloem.models._vision import Block, BlockKind, VisionTower, patches, vector
from phloem.models.qwen2 import windows

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from phloem.core.media import Media
    from phloem.layers.context import BuildContext, Pack

# Beginnings of names in files, old and new, and ours.
RENAMES = {
    "vision_tower.vision_model.": "vision_tower.",
    "model.vision_tower.vision_model.": "vision_tower.",
    "model.vision_tower.": "vision_tower.",
    "model.multi_modal_projector.": "multi_modal_projector.",
    "language_model.model.": "model.",
    "model.language_model.": "model.",
    "language_model.lm_head.": "lm_head.",
}


def clip_block(vision: dict[str, Any], activation: str = "quick_gelu", eps: float = 1e-5) -> BlockKind:
    """A layer of CLIP or SigLIP."""
    return BlockKind(
        vision["hidden_size"],
        vision["num_attention_heads"],
        vision["intermediate_size"],
        float(vision.get("layer_norm_eps", eps)),
        vision.get("hidden_act", activation),
        norms=("layer_norm1", "layer_norm2"),
        attention="self_attn",
        qkv=("q_proj", "k_proj", "v_proj"),
        out="out_proj",
    )


@dataclass(frozen=True)
class Names:
    """Of the tensors around the layers; "": there is none."""

    patch: str = "embeddings.patch_embedding"
    positions: str = "embeddings.position_embedding.weight"
    classes: str = ""
    before: str = ""
    after: str = ""
    layers: str = "encoder.layers"


class ViT(Layer):
    """Patches of `patch` pixels, `side` in a row; `depth` layers are computed."""

    def __init__(
        self, ctx: BuildContext, kind: BlockKind, depth: int, patch: int, side: int, names: Names, *, bias: bool = True
    ) -> None:
        self.ops, self.patch, self.side, self.size = ctx.ops, patch, side, kind.hidden_size
        stem, _, last = names.patch.rpartition(".")
        self.embed = Linear(ctx.child(stem), 3 * patch**2, {last: self.size}, bias=bias)
        self.classes = vector(ctx, names.classes, self.size) if names.classes else None
        self.positions = vector(ctx, names.positions, side**2 + bool(names.classes), self.size)
        self.before = kind.norm(ctx.child(names.before)) if names.before else None
        self.blocks = [Block(ctx.child(names.layers).child(number), kind) for number in range(depth)]
        self.after = kind.norm(ctx.child(names.after)) if names.after else None

    def __call__(self, pixels_BCHW: Tensor, like: torch.dtype | None, pack: Pack) -> Tensor:
        """[B, T, N]."""
        cut = patches(pixels_BCHW, self.patch).flatten(2)
        x = self.embed(cut.flatten(0, 1) if like is None else cut.flatten(0, 1).to(like))[0]
        count = len(pixels_BCHW)
        x_BTN = x.unflatten(0, (count, -1))
        if self.classes is not None:
            one = self.classes.value.to(x.dtype).expand(count, 1, -1)
            x_BTN = torch.cat([one, x_BTN], 1)
        x_BTN = x_BTN + self._positions(x_BTN.shape[1]).to(x.dtype)
        x = x_BTN.flatten(0, 1)
        x = x if self.before is None else self.before(x)
        memory = pack([x_BTN.shape[1]] * count)
        for block in self.blocks:
            x = block(x, memory, None)
        x = x if self.after is None else self.after(x)
        return x.unflatten(0, (count, -1))

    def _positions(self, wanted: int) -> Tensor:
        table: Tensor = self.positions.value
        if len(table) == wanted:
            return table
        raise ValueError(f"a tower of {len(table)} places got {wanted} patches")


class Projector(Layer):
    """Two matrices with GELU between them, perhaps behind a norm."""

    def __init__(self, ctx: BuildContext, inputs: int, outputs: int, *, bias: bool = True) -> None:
        self.ops = ctx.ops
        self.up = Linear(ctx, inputs, {"linear_1": outputs}, bias=bias)
        self.down = Linear(ctx, outputs, {"linear_2": outputs}, bias=bias)

    def __call__(self, x_TN: Tensor) -> Tensor:
        return self.down(self.ops.gelu(self.up(x_TN)[0]))[0]


class TileTower(VisionTower):
    """A `ViT` over the tiles of pictures; subclasses join it to the model (`joined`)."""

    vit: ViT

    def encode(self, items: Sequence[Media], pack: Pack) -> list[Tensor]:
        pixels = torch.cat([self.pixels(item) for item in items])
        made = self.joined(self.vit(pixels, self.like, pack))  # [B, tokens of a tile, M]
        tiles = [item.shape[0] for item in items]
        return [part.flatten(0, 1) for part in made.split(tiles)]

    def joined(self, x_BTN: Tensor) -> Tensor:
        raise NotImplementedError


def shuffled(x_BTN: Tensor, factor: int, *, columns_first: bool = False) -> Tensor:
    """Squares of factor x factor patches as one [B, T / factor^2, factor^2 N], row by row; or their columns first."""
    side = round(x_BTN.shape[1] ** 0.5)
    cut = x_BTN.view(len(x_BTN), side // factor, factor, side // factor, factor, -1)
    order = (0, 1, 3, 4, 2, 5) if columns_first else (0, 1, 3, 2, 4, 5)
    return cut.permute(*order).reshape(len(x_BTN), (side // factor) ** 2, -1)


def text_decoder(config: dict[str, Any]) -> DecoderConfig:
    """The language model of a `text_config`. Raises ModelLoadError for one that no family with a tower has here."""
    kind = (config.get("text_config") or {}).get("model_type", "llama")
    if kind == "llama":
        return usual(config)
    if kind == "mistral":
        window = int(config.get("sliding_window") or 0)
        return usual(config, layers=(usual_layer(config, window=window),) * config["num_hidden_layers"])
    if kind == "ministral3":
        return ministral3.decoder_config(config)
    if kind == "qwen2":
        sizes = windows(config)
        layers = each_layer(config, lambda n: usual_layer(config, window=sizes[n], qkv_bias=True, out_bias=False))
        return usual(config, layers=layers)
    if kind == "qwen3":
        return usual(config, layers=(usual_layer(config, qk_norm="head"),) * config["num_hidden_layers"])
    raise ModelLoadError(
        f"text_config.model_type {kind!r} is not served with a tower; known: llama, mistral, ministral3, qwen2, qwen3"
    )
