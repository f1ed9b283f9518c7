"""The towers of the Qwen-VL models: patches in blocks that are merged at the end, turned by height and width."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from phloem.kernels.ops import Rotation
from phloem.layers.linear import Linear
from phloem.models._vision import Block, BlockKind, VisionTower, patches

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from phloem.core.media import Media
    from phloem.layers.context import BuildContext, Pack

RENAMES = {"model.visual.": "visual.", "model.language_model.": "model.", "visual.": "visual."}
BASE = 10000.0


@dataclass(frozen=True)
class QwenVision:
    """Sizes. `window`: side of the windows in pixels, for all layers but `full`; 0: every layer sees its picture."""

    kind: BlockKind
    depth: int
    patch: int
    merge: int
    frames: int  # that a patch spans
    out_size: int
    bias: bool = False  # of the patches' matrix
    window: int = 0
    full: tuple[int, ...] = ()


class QwenTower(VisionTower):
    """Of Qwen2-VL and Qwen2.5-VL."""

    turns = True

    def __init__(self, ctx: BuildContext, token: int, sizes: QwenVision) -> None:
        super().__init__(ctx, token, sizes.out_size)
        ctx, kind, self.sizes = ctx.child("visual"), sizes.kind, sizes
        inputs = 3 * sizes.frames * sizes.patch**2
        self.embed = Linear(ctx.child("patch_embed"), inputs, {"proj": kind.hidden_size}, bias=sizes.bias)
        self.blocks = [Block(ctx.child("blocks").child(number), kind) for number in range(sizes.depth)]
        self.joins(ctx)

    def joins(self, ctx: BuildContext) -> None:
        """What makes embeddings of the last layer's patches."""
        sizes, kind = self.sizes, self.sizes.kind
        merger, wide = ctx.child("merger"), kind.hidden_size * sizes.merge**2
        self.norm = kind.norm(merger.child("ln_q"))
        self.up = Linear(merger.child("mlp"), wide, {"0": wide}, bias=True)
        self.down = Linear(merger.child("mlp"), wide, {"2": sizes.out_size}, bias=True)

    def grid(self, item: Media) -> tuple[int, int, int]:
        """Steps in time, rows and columns of merged patches."""
        block = self.sizes.patch * self.sizes.merge
        frames = -(-item.shape[0] // self.sizes.frames)
        return frames, item.shape[1] // block, item.shape[2] // block

    def encode(self, items: Sequence[Media], pack: Pack) -> list[Tensor]:
        sizes, unit = self.sizes, self.sizes.merge**2
        grids = [self.grid(item) for item in items]
        x_TN = self.embed(self.cast(torch.cat([self._patches(item) for item in items])))[0]
        turned = torch.cat([self._places(grid) for grid in grids])
        lengths = [h * w * unit for t, h, w in grids for _ in range(t)]
        whole = pack(lengths)
        windows, order = whole, None
        if sizes.window:
            order, counts = _windows(grids, sizes.window // sizes.merge // sizes.patch)
            order = order.to(self.device)
            windows = pack([count * unit for count in counts])
            x_TN = x_TN.unflatten(0, (-1, unit))[order].flatten(0, 1)
            turned = turned.unflatten(0, (-1, unit))[order].flatten(0, 1)
        rotation = self._rotation(turned)
        for number, block in enumerate(self.blocks):
            x_TN = block(x_TN, whole if not sizes.window or number in sizes.full else windows, rotation)
        merged = self.down(self.ops.gelu(self.up(self.norm(x_TN).reshape(-1, unit * x_TN.shape[1]))[0]))[0]
        if order is not None:
            merged = merged[torch.argsort(order)]
        return list(merged.split([t * h * w for t, h, w in grids]))

    def _patches(self, item: Media) -> Tensor:
        """[T, 3 frames patch patch]: block by block; a lone frame stands for as many as a patch spans."""
        sizes = self.sizes
        cut = patches(self.pixels(item), sizes.patch, sizes.merge)  # [frames, patches, 3, P, P]
        short = -len(cut) % sizes.frames
        cut = torch.cat([cut, cut[-1:].expand(short, -1, -1, -1, -1)]) if short else cut
        return cut.unflatten(0, (-1, sizes.frames)).permute(0, 2, 3, 1, 4, 5).flatten(2).flatten(0, 1)

    def _places(self, grid: tuple[int, int, int]) -> Tensor:
        """Height and width of every patch [T, 2], block by block."""
        (frames, height, width), merge = grid, self.sizes.merge
        at = np.indices((height * merge, width * merge)).reshape(2, height, merge, width, merge)
        flat = at.transpose(0, 1, 3, 2, 4).reshape(2, -1)
        return torch.from_numpy(np.tile(flat, frames).T.copy()).to(self.device)

    def _rotation(self, places_T2: Tensor) -> Rotation:
        half = self.sizes.kind.hidden_size // self.sizes.kind.heads // 2
        slow = 1.0 / BASE ** (torch.arange(0, half, 2, dtype=torch.float32, device=self.device) / half)
        angles = (places_T2[:, :, None].float() * slow).flatten(1)  # [T, half]: those of height, then of width
        table = torch.stack([angles.cos(), angles.sin()], 1).contiguous()
        return Rotation(torch.arange(len(table), device=self.device), table, False)


def _windows(grids: Sequence[tuple[int, int, int]], side: int) -> tuple[Tensor, list[int]]:
    """The merged patches in windows of side x side, window by window, and how many each window has."""
    order: list[np.ndarray[Any, Any]] = []
    counts: list[int] = []
    first = 0
    for frames, height, width in grids:
        at = np.arange(frames * height * width).reshape(frames, height, width) + first
        for frame in at:
            for top in range(0, height, side):
                for left in range(0, width, side):
                    piece = frame[top : top + side, left : left + side].ravel()
                    order.append(piece)
                    counts.append(len(piece))
        first += frames * height * width
    return torch.from_numpy(np.concatenate(order)), counts
