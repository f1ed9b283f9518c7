"""Towers that make embeddings of pictures, over the op table, and the decoder that takes them.

All pictures of a step are packed, as texts are: T patches of all of them, each with its own neighbours.
Legend: T patches or merged patches, N the tower's hidden size, M the model's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from phloem.core.media import as_pixels
from phloem.distributed.mesh import Mesh
from phloem.kernels.ops import Rotation
from phloem.layers.context import AttentionSpec, Heads
from phloem.layers.linear import Linear
from phloem.layers.mlp import GatedMLP, PlainMLP
from phloem.layers.norm import LayerNorm, RMSNorm
from phloem.layers.weight import Layer, Weight
from phloem.models._common import Decoder, DecoderConfig, renamed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from phloem.core.media import Media
    from phloem.layers.context import BuildContext, Pack, StepMemory
    from phloem.layers.norm import AnyNorm


@dataclass(frozen=True)
class BlockKind:
    """One layer of a tower: attention over all patches of a picture or window, and a feed-forward block, behind norms.

    `qkv`: one fused projection, or three; `scales`: names of vectors that what each block gives is multiplied by.
    """

    hidden_size: int
    heads: int
    inner_size: int
    eps: float
    activation: str
    rms: bool = False
    gated: bool = False
    bias: bool = True
    norms: tuple[str, str] = ("norm1", "norm2")
    attention: str = "attn"
    qkv: tuple[str, ...] = ("qkv",)
    qkv_bias: bool = True
    out: str = "proj"
    mlp: str = "mlp"
    plain: tuple[str, str] = ("fc1", "fc2")
    scales: tuple[str, ...] = ()
    qk_norms: tuple[str, ...] = ()

    def norm(self, ctx: BuildContext, size: int = 0) -> AnyNorm:
        size = size or self.hidden_size
        return RMSNorm(ctx, size, self.eps) if self.rms else LayerNorm(ctx, size, self.eps)


class Block(Layer):
    """A layer of a tower."""

    def __init__(self, ctx: BuildContext, kind: BlockKind) -> None:
        self.ops, size = ctx.ops, kind.hidden_size
        head = size // kind.heads
        self.spec = AttentionSpec(0, kind.heads, kind.heads, head, head**-0.5, causal=False)
        self.before, self.between = (kind.norm(ctx.child(name)) for name in kind.norms)
        own = ctx.child(kind.attention)
        parts = {name: 3 * size // len(kind.qkv) for name in kind.qkv}
        self.qkv = Linear(own, size, parts, bias=kind.qkv_bias)
        self.qk_norms = [kind.norm(own.child(name)) for name in kind.qk_norms]
        self.out = Linear(own, size, {kind.out: size}, bias=kind.bias)
        # Every rank has the whole tower: it is small, and runs once a picture.
        mlp, sizes = replace(ctx.child(kind.mlp), mesh=Mesh()), (size, kind.inner_size, kind.activation)
        self.mlp = (
            GatedMLP(mlp, *sizes, bias=kind.bias)
            if kind.gated
            else PlainMLP(mlp, *sizes, bias=kind.bias, names=kind.plain)
        )
        self.scales = [vector(ctx, name, size) for name in kind.scales]

    def __call__(self, x_TN: Tensor, memory: StepMemory, rotation: Rotation | None) -> Tensor:
        qkv, heads = self.qkv(self.before(x_TN))[0], self.spec.heads
        q_TN, k_TN, v_TN = qkv.chunk(3, -1)
        if self.qk_norms:
            q_TN, k_TN = self.qk_norms[0](q_TN), self.qk_norms[1](k_TN)
        q, k, v = (part.unflatten(-1, (heads, -1)) for part in (q_TN, k_TN, v_TN))
        attended = memory.attend(self.spec, Heads(q, k, v, rotation=rotation))
        x_TN = self.ops.add(self._scaled(self.out(attended.flatten(1))[0], 0), x_TN)
        return self.ops.add(self._scaled(self.mlp(None, self.between(x_TN), None, add=False)[0], 1), x_TN)

    def _scaled(self, x_TN: Tensor, which: int) -> Tensor:
        return x_TN * self.scales[which].value.to(x_TN.dtype) if self.scales else x_TN


def vector(ctx: BuildContext, name: str, *shape: int) -> Weight:
    """A float32 tensor that no matrix product takes: a class embedding, a table of positions."""
    return Weight((ctx.child(name).name,), (shape,), "norm")


class VisionTower(Layer):
    """What all towers have. `token`: the placeholder; `turns`: tokens have places in time, height and width.

    Subclasses give `encode`; `like`, set by the decoder, says in which type the model computes.
    """

    turns = False
    whole = False  # the tokens of a picture see each other both ways
    parts = 1  # of an embedding, each as wide as the model

    def __init__(self, ctx: BuildContext, token: int, hidden_size: int) -> None:
        self.ops, self.device = ctx.ops, ctx.device
        self.token, self.hidden_size = token, hidden_size
        self.like: torch.dtype | None = None

    def encode(self, items: Sequence[Media], pack: Pack) -> list[Tensor]:
        """[tokens, M] of each picture, or [tokens, k M]: further parts are added behind the model's first layers."""
        raise NotImplementedError

    def settle(self) -> None:
        """Weights have changed: make again what is made of them. Most towers keep nothing of the kind."""

    def pixels(self, item: Media) -> Tensor:
        """[pictures, 3, height, width] float32, as the model was trained on them."""
        raw = torch.from_numpy(np.array(as_pixels(item))).to(self.device).permute(0, 3, 1, 2).float()
        factors = torch.tensor(item.scale, dtype=torch.float32, device=self.device).view(2, 3, 1, 1)
        return raw * factors[0] + factors[1]

    def cast(self, x: Tensor) -> Tensor:
        return x if self.like is None else x.to(self.like)


def patches(pixels_BCHW: Tensor, size: int, merge: int = 1) -> Tensor:
    """[B, patches, C, size, size], row by row, or in blocks of merge x merge patches, row by row.

    Pixels behind the last whole block are left out."""
    block = size * merge
    height, width = (side // block * block for side in pixels_BCHW.shape[2:])
    pixels_BCHW = pixels_BCHW[..., :height, :width]
    count, channels = pixels_BCHW.shape[:2]
    cut = pixels_BCHW.reshape(count, channels, height // block, merge, size, width // block, merge, size)
    return cut.permute(0, 2, 5, 3, 6, 1, 4, 7).reshape(count, -1, channels, size, size)


class SeeingDecoder(Decoder):
    """A decoder that takes pictures. `renames`: beginnings of names in files and ours, the first that fits."""

    def __init__(
        self,
        ctx: BuildContext,
        config: DecoderConfig,
        max_positions: int,
        tower: VisionTower,
        renames: dict[str, str],
    ) -> None:
        self.tower = self.seeing = tower
        for weight in tower.weights():
            weight.plain = True
        self.renames = renames
        super().__init__(ctx, config, max_positions)

    def checkpoint_name(self, name: str) -> str | None:
        ours = renamed(name, self.renames) or name
        # Layers behind the one whose patches are taken, and heads of their own.
        unused = ours.startswith(("vision_tower.", "vision_model.")) and ours not in self.index.slots
        return None if unused else ours

    def load(self, checkpoint: Any, progress: Any) -> None:
        super().load(checkpoint, progress)
        ids = torch.zeros(1, dtype=torch.int64, device=self.seeing.device)
        self.seeing.like = self.embed(ids).dtype
        self.settle()

    def settle(self) -> None:
        self.seeing.settle()
