"""Towers alone: an engine that makes embeddings for others, and a model whose embeddings others make.

An encoder server reads nothing of a checkpoint but its tower. What it makes is kept by content, as
`engine.towers.media` keeps it where the model is: the same picture of another server is found.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import msgspec
import torch

from phloem import models, platforms, quant
from phloem.attention._packed import PackedMemory
from phloem.checkpoint.fingerprint import fingerprint
from phloem.core import resolve
from phloem.core.errors import BadRequest, ConfigError, OutOfMemory, PhloemError
from phloem.core.ranges import parse_bytes
from phloem.core.resolve import Decision
from phloem.engine.choices.dtypes import dtype_of
from phloem.engine.memory import first_line, is_out_of_memory
from phloem.engine.towers.media import EncoderCache
from phloem.layers.context import BuildContext
from phloem.models._apart import Elsewhere, load_tower_alone, without_tower
from phloem.models._common import Decoder
from phloem.models._foreign_tower import load_tower
from phloem.utils import log
from phloem.utils.cores import available_cores

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from phloem.checkpoint.describe import Checkpoint
    from phloem.core.config import Config
    from phloem.core.media import Media
    from phloem.models import Loadable, Model
    from phloem.models._vision import VisionTower
    from phloem.platforms import Platform

_log = log.get("engine")


@dataclass(frozen=True)
class Embedding:
    """[tokens, M] of one picture, video or sound: the bytes of its values, row by row, and their type."""

    shape: tuple[int, int]
    kind: str
    data: bytes


class Encoder:
    """A tower and what it has made, by content. Used by one thread alone."""

    def __init__(self, tower: VisionTower, platform: Platform, pack: Callable[..., Any], budget: int) -> None:
        self.tower, self.cache = tower, EncoderCache(budget)
        self._platform, self._pack = platform, pack
        self.encoded = self.found = 0

    @property
    def kind(self) -> str:
        """The type of its embeddings."""
        return kind_of(self.tower)

    def begin(self) -> None:
        """Once, in the thread that encodes."""
        self._platform.begin_steps()

    def encode(self, items: Sequence[Media]) -> list[Embedding | PhloemError]:
        """Of each item, or why there is none: one that cannot be encoded harms no other."""
        keys = [content_of(item) for item in items]
        made: dict[bytes, Tensor | PhloemError] = {}
        fresh: dict[bytes, Media] = {}
        for key, item in zip(keys, items, strict=True):
            kept = self.cache.get(key)
            if kept is None:
                fresh[key] = item
            else:
                made[key] = kept
        self.found += len(items) - len(fresh)
        made |= self._made(fresh)
        return [one if isinstance(one := made[key], PhloemError) else _told(one) for key in keys]

    def _made(self, fresh: dict[bytes, Media]) -> dict[bytes, Tensor | PhloemError]:
        """All in one pass, and one by one where that fails."""
        if not fresh:
            return {}
        try:
            with torch.inference_mode():
                several = self.tower.encode(list(fresh.values()), self._pack)
            found = dict(zip(fresh, several, strict=True))
            for key, item in fresh.items():
                _check(item, found[key])
        except Exception as error:
            self._platform.empty_cache()
            if len(fresh) > 1:
                return {name: one for key, item in fresh.items() for name, one in self._made({key: item}).items()}
            _log.warning("an item could not be encoded: %s: %s", type(error).__name__, error)
            return dict.fromkeys(fresh, _refusal(error))
        self.encoded += len(found)
        for key, features in found.items():
            self.cache.put(key, features)
        return {**found}


def content_of(item: Media) -> bytes:
    """What a tower makes follows from this: all of an item but its places in a prompt. The sender's own digest is not
    looked at, which it could take from another picture."""
    spans = [(0, count) for _, count in item.spans]
    told = msgspec.msgpack.encode(msgspec.structs.replace(item, digest=b"", spans=spans))
    return blake2b(told, digest_size=32).digest()


def _check(item: Media, features: Tensor) -> None:
    if features.ndim != 2 or len(features) != item.count:
        raise BadRequest(f"an item of {item.count} tokens became {len(features)} embeddings")


def _refusal(error: Exception) -> PhloemError:
    if isinstance(error, PhloemError):
        return error
    text = f"this cannot be encoded: {first_line(error):.300}"
    return OutOfMemory(text) if is_out_of_memory(error) else BadRequest(text)


def _told(features: Tensor) -> Embedding:
    flat = features.detach().contiguous().cpu()
    shape = (flat.shape[0], flat.shape[1])
    data = flat.view(torch.uint8).numpy().tobytes()
    return Embedding(shape, str(flat.dtype).removeprefix("torch."), data)


def kind_of(tower: VisionTower) -> str:
    assert tower.like is not None, "its weights have not been read"
    return str(tower.like).removeprefix("torch.")


def facts_of(checkpoint: Checkpoint, tower: VisionTower) -> dict[str, str]:
    """What an encoder server and its callers must have alike, by names for people."""
    config = checkpoint.config if checkpoint.seen is None else checkpoint.seen.config
    settings = msgspec.json.encode(config, order="sorted", enc_hook=str)
    return {
        "model": f"{checkpoint.model_type} {blake2b(settings, digest_size=8).hexdigest()}",
        "weights": fingerprint(checkpoint),
        "dtype": kind_of(tower),
    }


@dataclass(frozen=True)
class BuiltEncoder:
    encoder: Encoder
    facts: dict[str, str]
    decisions: list[Decision]
    info: dict[str, Any]


def build_encoder(config: Config, checkpoint: Checkpoint, report: Callable[[str], None]) -> BuiltEncoder:
    """Read a checkpoint's tower. `report`: told when a phase has ended.

    Raises:
        ConfigError: a setting that this machine cannot serve.
        ModelLoadError: the model has no tower, or its tensors are missing.
    """
    decisions: list[Decision] = []
    threads = resolve.threads(config.runtime.threads, max(1, available_cores()))
    platform, chosen = platforms.choose(config.runtime.device, threads.value)
    ops, why = platform.table(config.runtime.ops, float32=config.model.dtype == "float32")
    decisions += [threads, chosen, Decision("ops", ops.name, why)]
    dtype = dtype_of(config, checkpoint, platform, decisions)
    if checkpoint.chosen.impl != "phloem":
        text = f"encoder_only: {checkpoint.chosen.reason}, and its tower cannot be run alone"
        raise ConfigError(text, param="encoder_only")
    report("device")
    method = quant.method_for(None, checkpoint.stored)
    tower, nbytes = load_tower_alone(checkpoint, BuildContext(ops, dtype, platform.device, quant=method))
    budget = parse_bytes(config.media.mm_encoder_cache, "mm_encoder_cache")
    encoder = Encoder(tower, platform, partial(PackedMemory, ops), budget)
    report("weights")
    info = {"weight_bytes": nbytes, "device": platform.name, "dtype": encoder.kind}
    return BuiltEncoder(encoder, facts_of(checkpoint, tower), decisions, info)


def load_seeing(
    config: Config,
    checkpoint: Checkpoint,
    ctx: BuildContext,
    progress: Callable[[str, float], None],
    decisions: list[Decision],
    check: Callable[[Loadable], None],
) -> Model:
    """A model of ours with its weights, and what sees for it: its own tower, one of transformers' code, or none, where
    encoder servers have it. `check`: called with the model before its weights are read. Raises ModelLoadError, and what
    `check` raises."""
    alone = config.disagg.language_only

    def cut(model: Loadable) -> None:
        check(model)
        if alone and checkpoint.seen is None:
            without_tower(model)

    model = models.load_model(checkpoint, ctx, progress, cut)
    if checkpoint.seen is not None and isinstance(model, Decoder):
        seen, size = checkpoint.seen, model.hidden_size
        model.tower = _elsewhere(ctx, seen.token, size) if alone else load_tower(checkpoint, seen, ctx, size)
        decisions.append(Decision("tower", "transformers", f"no file models/{seen.model_type}.py"))
    if alone:
        decisions.append(Decision("language_only", True, "encoder servers have the tower"))
    return model


def _elsewhere(ctx: BuildContext, token: int, hidden_size: int) -> Elsewhere:
    """For a tower of transformers' code, which computes in the type of its weights."""
    found = Elsewhere(ctx, token, hidden_size)
    found.like = ctx.dtype
    return found
