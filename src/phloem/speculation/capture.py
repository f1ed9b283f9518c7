"""Hidden states of whole texts, as heads that draft are trained on: by the model's own layers and op table.

    model = open_target("path/of/the/model")
    for states in capture(model, [[1, 5, 7], [1, 9]]):
        states.aux_TA, states.last_TN

Legend: T tokens of a text, N hidden size, A the widths of all auxiliary states together: 3 N.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from phloem import models, platforms, quant
from phloem.attention._packed import PackedMemory, refusal
from phloem.checkpoint.describe import describe
from phloem.core import resolve
from phloem.core.errors import ConfigError
from phloem.core.media import places
from phloem.layers.context import BuildContext, ForwardBatch
from phloem.models._common import Decoder
from phloem.utils import machine
from phloem.utils.cores import available_cores

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from phloem.core.media import Media
    from phloem.models import Tower


def aux_layers(num_layers: int) -> tuple[int, int, int]:
    """The layers whose input an EAGLE-3 head reads, low, middle and high, counted from 0 (Li et al. 2025).

    Raises:
        ValueError: for a model of fewer than three layers.
    """
    if num_layers < 3:
        raise ValueError(f"a model of {num_layers} layers has no three of them to read from")
    return 2, num_layers // 2, num_layers - 3


@dataclass(frozen=True)
class Captured:
    """Of one text."""

    aux_TA: Tensor  # the residual stream before each of the layers, side by side
    last_TN: Tensor  # behind the last norm: what the head reads


class _Capture:
    """A `layers.context.Tap` that keeps what it sees."""

    last = True

    def __init__(self, layers: tuple[int, ...]) -> None:
        self.layers = layers
        self.states: list[Tensor] = []
        self.hidden_TN: Tensor | None = None

    def before(self, step: ForwardBatch, states: list[Tensor], /) -> None:
        del step
        self.states = states

    def behind(self, step: ForwardBatch, hidden_TN: Tensor, /) -> None:
        del step
        self.hidden_TN = hidden_TN


def capture(
    model: Decoder,
    texts: Sequence[Sequence[int]],
    layers: Sequence[int] | None = None,
    media: Sequence[Sequence[Media]] = (),
) -> list[Captured]:
    """Run whole texts in one step, each from its first token on.

    Args:
        model: from `open_target`, or an engine's own between two steps.
        texts: token ids of each, at least one.
        layers: whose input is wanted; None: those of `aux_layers`.
        media: pictures of each text, whose tokens in it are placeholders; (): no text has any.

    Raises:
        ConfigError: the model's layers are recurrent or latent, its family gives no residual stream, or it has no
            pictures that can be computed so.
        ValueError: an empty text, or a layer that is not there.
    """
    wanted = tuple(aux_layers(len(model.layers)) if layers is None else layers)
    if not wanted or not all(0 <= number < len(model.layers) for number in wanted):
        raise ValueError(f"layers {list(wanted)} are not among 0 to {len(model.layers) - 1}")
    if (why := untapped(model) or refusal(model.memory, model.attention_specs)) is not None:
        raise ConfigError(f"hidden states cannot be captured: {why}", param="model_path")
    lengths = [len(text) for text in texts]
    if not lengths or min(lengths) < 1:
        raise ValueError("there is nothing to run in an empty text")
    device = model.index.ctx.device
    ids_T = torch.tensor([token for text in texts for token in text], dtype=torch.int64, device=device)
    positions_T = torch.cat([torch.arange(length) for length in lengths]).to(device)
    tap, before = _Capture(wanted), model.tap
    step = ForwardBatch(ids_T, positions_T, PackedMemory(model.ops, lengths), None)
    model.tap = tap
    try:
        with torch.no_grad():
            if any(media):
                _see(model, step, lengths, media)
            model.forward(step)
    finally:
        model.tap = before
    assert tap.hidden_TN is not None
    aux_TA = torch.cat(tap.states, -1)
    return [Captured(*pair) for pair in zip(aux_TA.split(lengths), tap.hidden_TN.split(lengths), strict=True)]


def _see(model: Decoder, step: ForwardBatch, lengths: Sequence[int], media: Sequence[Sequence[Media]]) -> None:
    """Put what the tower makes of pictures in the place of their tokens' embeddings, and tokens where they are."""
    tower = model.tower
    if tower is None or tower.whole:
        why = "it takes none" if tower is None else "their tokens see each other both ways, which whole texts do not"
        raise ConfigError(f"hidden states of pictures cannot be captured: {why}", param="model_path")
    items = {item.digest: item for own in media for item in own}
    made = dict(zip(items, tower.encode(list(items.values()), partial(PackedMemory, model.ops)), strict=True))
    index: list[Tensor] = []
    values: list[Tensor] = []
    positions: list[Tensor] = []
    begin = 0
    for length, own in zip(lengths, media, strict=True):
        for item in own:
            index += [torch.arange(begin + start, begin + start + count) for start, count in item.spans]
            values.append(made[item.digest])
        positions.append(_places(tower, length, own))
        begin += length
    device = step.input_ids.device
    values_nN, *deep = torch.cat(values).split(tower.hidden_size, -1)
    step.embeds = torch.cat(index).to(device), values_nN
    step.deep = torch.stack(deep) if deep else None
    if tower.turns:
        step.positions = torch.cat(positions, -1).to(device)


def _places(tower: Tower, length: int, media: Sequence[Media]) -> Tensor:
    """[3, tokens of a text]."""
    if not tower.turns or not media:
        return torch.arange(length).expand(3, -1)
    turned, after = places(sorted(media, key=lambda item: item.end))
    rest = np.arange(after, after + length - turned.shape[1])
    return torch.from_numpy(np.concatenate([turned, np.repeat(rest[None], 3, axis=0)], 1)[:, :length])


def untapped(model: Decoder) -> str | None:
    """Why a model gives nobody its residual stream, or None."""
    own = type(model).trunk is Decoder.trunk and type(model).forward is Decoder.forward
    return None if own else "layers of this family have more than one residual stream"


def open_target(model_path: str, *, device: str = "auto", dtype: str = "auto", threads: int | None = None) -> Decoder:
    """A model with its weights, on this machine, for `capture`.

    Raises:
        ConfigError: a setting that this machine cannot serve, or a model that does not generate by our own code.
        ModelLoadError: the checkpoint is missing something or is corrupt.
    """
    checkpoint = describe(model_path)
    if checkpoint.pooling is not None or checkpoint.chosen.impl != "phloem":
        raise ConfigError(f"{model_path}: it does not generate, or its code is not ours", param="model_path")
    context = resolve.context_length(None, checkpoint.context_length, machine.memory()[1]).value
    checkpoint = replace(checkpoint, context_length=context)
    cores = resolve.threads(threads, available_cores()).value
    platform, _ = platforms.choose(device, cores)
    kind = getattr(torch, dtype) if dtype != "auto" else platform.dtype(checkpoint.config.get("dtype"))[0]
    ops, _ = platform.table(None, float32=dtype == "float32")
    method = quant.method_for(None, checkpoint.stored)
    model = models.load_model(checkpoint, BuildContext(ops, kind, platform.device, quant=method))
    if not isinstance(model, Decoder):
        raise ConfigError(f"{model_path}: its code is not ours", param="model_path")
    platform.begin_steps()
    return model
