"""A tower without its language model, and a language model without its tower, for servers that do one of the two."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from phloem.core.errors import ModelLoadError
from phloem.models import build_model
from phloem.models._foreign_tower import load_tower
from phloem.models._index import WeightIndex, open_sources
from phloem.models._vision import SeeingDecoder, VisionTower
from phloem.quant import method_for

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from phloem.checkpoint.describe import Checkpoint
    from phloem.core.media import Media
    from phloem.layers.context import BuildContext, Pack
    from phloem.models import Loadable


class Elsewhere(VisionTower):
    """In the place of a tower that another server has: what the language model must know of it, and no weights."""

    def __init__(self, ctx: BuildContext, token: int, hidden_size: int, of: VisionTower | None = None) -> None:
        super().__init__(ctx, token, hidden_size)
        if of is not None:
            self.turns, self.whole, self.parts = of.turns, of.whole, of.parts

    def encode(self, items: Sequence[Media], pack: Pack) -> list[Tensor]:
        raise RuntimeError("this server has no tower: embeddings come with the request (language_only)")


def without_tower(model: Loadable) -> None:
    """Before its weights are read. Raises ModelLoadError for a model that has no tower."""
    if not isinstance(model, SeeingDecoder):
        raise ModelLoadError("language_only: this model has no tower that could be elsewhere")
    ctx, own = model.index.ctx, model.seeing
    away = [name for weight in own.weights() for name in weight.names]
    model.tower = model.seeing = Elsewhere(ctx, own.token, own.hidden_size, own)
    away += [] if model.stage is None else model.stage.elsewhere
    model.index = WeightIndex(model.weights(), ctx, model.embed.weight.names[0], away)


def load_tower_alone(
    checkpoint: Checkpoint, ctx: BuildContext, progress: Callable[[str, float], None] | None = None
) -> tuple[VisionTower, int]:
    """The tower with its weights, and how many bytes these take; nothing else of the checkpoint is read.

    Raises:
        ModelLoadError: the model has none, or as `load_model`.
    """
    if checkpoint.seen is not None:
        found = load_tower(checkpoint, checkpoint.seen, ctx, checkpoint.config["hidden_size"])
        return found, found.weight_bytes
    if ctx.quant is None:
        ctx = replace(ctx, quant=method_for(None, checkpoint.stored))
    own = replace(ctx, name="")
    model = build_model(checkpoint.model_type, checkpoint.config, own, checkpoint.context_length)
    if not isinstance(model, SeeingDecoder) or checkpoint.gguf is not None:
        raise ModelLoadError(f"{checkpoint.path}: encoder_only: this model has no tower here")
    tower = model.seeing
    index = WeightIndex(tower.weights(), own, model.embed.weight.names[0])
    sources, _ = open_sources(checkpoint, index, model.checkpoint_name, whole=False)
    index.pull(sources, str(checkpoint.path), progress)
    tower.like = index.activations()
    tower.settle()
    return tower, index.nbytes
