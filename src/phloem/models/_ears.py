"""The encoder of a model that hears (Radford et al., 2022): two convolutions over a log-mel spectrogram, then layers
that see all of it.

Legend: n audios, B mel bands, F frames, S at most F / 2 states of each audio, N hidden size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from phloem.layers.attention import AttentionOptions
from phloem.layers.context import ForwardBatch
from phloem.layers.weight import Layer, Weight
from phloem.models._layer import Attention, LayerKind, Place, Plain
from phloem.models._sources import Read

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor

    from phloem.layers.context import BuildContext, Pack
    from phloem.models._layer import DecoderLayer

BASE = 10_000  # of sines
TAPS = 3  # of both convolutions; the second takes every other frame


def keys_without_bias(weights: Iterable[Weight]) -> None:
    """Of projections that lie together, where queries and values have one."""
    for weight in weights:
        weight.zeros = tuple(name for name in weight.names if name.endswith("k_proj.bias"))


def sines(size: int, count: int) -> Tensor:
    """[count, size]: places as sines, then cosines, ever slower."""
    half = size // 2
    slow = torch.exp(torch.arange(half) * (-math.log(BASE) / (half - 1)))
    angles = torch.arange(count)[:, None] * slow
    return torch.cat([angles.sin(), angles.cos()], 1)


@dataclass(frozen=True)
class EarsConfig:
    bands: int
    states: int
    hidden_size: int
    inner_size: int
    layers: int
    heads: int
    activation: str
    eps: float
    pool: int = 1  # states whose mean is one
    norm: str = "layer_norm"
    learned: bool = True  # places; otherwise sines


class Convolution(Layer):
    """A convolution over frames, as a product of each frame with its neighbours: the table's product is faster."""

    def __init__(self, ctx: BuildContext, inputs: int, outputs: int, step: int) -> None:
        self.ops, self.dtype, self.device, self.step = ctx.ops, ctx.dtype, ctx.device, step
        self.sizes = inputs, outputs
        self.weight = Weight((f"{ctx.name}.weight",), ((outputs, inputs, TAPS),), "norm")
        self.bias = Weight((f"{ctx.name}.bias",), ((outputs,),), "bias")
        self.made: Any = None

    def settle(self) -> None:
        """Make the product's matrix of the weights as they are stored."""
        flat = self.weight.value.transpose(1, 2).flatten(1).contiguous()
        flat = flat if flat.is_meta else flat.cpu()
        source: Any = Read(self.weight.names[0], tuple(flat.shape), flat)
        self.made = self.ops.prepare_linear([source], self.dtype, self.device)

    def __call__(self, x_FC: Tensor) -> Tensor:
        """[F, inputs] -> [F / step rounded up, outputs]."""
        inputs = self.sizes[0]
        count = -(-len(x_FC) // self.step)
        padded = x_FC.new_zeros(self.step * count + TAPS - 1, inputs)
        padded[1 : len(x_FC) + 1] = x_FC
        around = padded.as_strided((count, TAPS * inputs), (self.step * inputs, 1))
        return self.ops.gelu(self.ops.linear(around.contiguous(), self.made, self.bias.value)[0])


def ear_layers(ctx: BuildContext, place: Place, count: int, heads: int, feed: tuple[int, str]) -> list[DecoderLayer]:
    """`feed`: size and activation of the feed-forward blocks."""
    options = AttentionOptions(qkv_bias=True, out_bias=True, o_proj="out_proj")
    attention = Attention(heads, heads, place.hidden_size // heads, None, options=options, causal=False)
    plain = Plain(*feed, True, ("fc1", "fc2"), name="")
    kind = LayerKind(attention, plain, norm_names=("self_attn_layer_norm", "final_layer_norm"))
    return [kind.make(ctx.child("layers").child(number), place) for number in range(count)]


class Ears(Layer):
    def __init__(self, ctx: BuildContext, config: EarsConfig) -> None:
        self.config, self.ops = config, ctx.ops
        size = config.hidden_size
        place = Place(size, config.eps, 0.0, config.states, norms="layer")
        self.convolutions = [
            Convolution(ctx.child("conv1"), config.bands, size, 1),
            Convolution(ctx.child("conv2"), size, size, 2),
        ]
        self.positions: Weight | None = None
        if config.learned:
            self.positions = Weight((ctx.child("embed_positions.weight").name,), ((config.states, size),), "norm")
        self.sines = torch.zeros(0)
        self.layers = ear_layers(ctx, place, config.layers, config.heads, (config.inner_size, config.activation))
        self.norm = place.norm(ctx.child(config.norm))

    def settle(self) -> None:
        """For whenever weights have changed."""
        for one in self.convolutions:
            one.settle()

    def __call__(self, mels_BF: Sequence[Tensor], pack: Pack, lengths: Sequence[int] = ()) -> Tensor:
        """States [n * S, N], final norm applied. `lengths`: how many of each audio are there; (): all."""
        states: list[Tensor] = []
        for number, mel_BF in enumerate(mels_BF):
            x_FC = mel_BF.T.to(self.convolutions[0].bias.value.dtype)
            for convolution in self.convolutions:
                x_FC = convolution(x_FC)
            x_FC = x_FC[: lengths[number]] if lengths else x_FC
            states.append(self.ops.add(x_FC, self._places(len(x_FC), x_FC)))
        x_TN, residual_TN = torch.cat(states), None
        nothing = torch.zeros(0, dtype=torch.int64, device=x_TN.device)
        step = ForwardBatch(nothing, nothing, pack([len(one) for one in states]), None)
        for layer in self.layers:
            x_TN, residual_TN = layer.attend(x_TN, residual_TN, step)
            x_TN, residual_TN = layer.feed(x_TN, residual_TN)
        pool = self.config.pool
        if pool == 1:
            return self.norm.add(x_TN, residual_TN)[0]
        x_TN = x_TN if residual_TN is None else self.ops.add(x_TN, residual_TN)
        parts = x_TN.split([len(one) for one in states])
        whole = [part[: len(part) // pool * pool].unflatten(0, (-1, pool)).mean(1) for part in parts]
        return self.norm(torch.cat(whole))

    def _places(self, count: int, like: Tensor) -> Tensor:
        if self.positions is not None:
            return self.positions.value[:count].to(like.dtype)
        if self.sines.device != like.device or not len(self.sines):
            self.sines = sines(self.config.hidden_size, self.config.states).to(like.device)
        return self.sines[:count].to(like.dtype)
