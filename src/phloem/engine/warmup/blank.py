"""Pictures, videos and sounds of nothing, of many sizes: what a tower launches for any shows on tensors without data.

The model's own processor makes them, so that they have the shapes that those of requests have.
"""

from __future__ import annotations

import importlib.util
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from phloem.attention._packed import PackedMemory
from phloem.checkpoint.families import FAMILIES, family
from phloem.core.media import Media
from phloem.multimodal import KINDS, PROCESSORS, Facts
from phloem.multimodal._settings import settings_in
from phloem.multimodal._video import Wanted

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from phloem.checkpoint.describe import Checkpoint
    from phloem.kernels.ops import Ops
    from phloem.models import Tower
    from phloem.multimodal import Processor

SIDES = (16, 40, 100, 256, 640, 1024)  # a processor makes larger ones of the least, and smaller ones of the most
FRAMES = (1, 2, 16)
SECONDS = (0.1, 0.5, 1.0, 3.0, 10.0, 29.0)
RATE = 16000  # of sounds


class Film:
    """A video of nothing (`multimodal._aside.Film`)."""

    fps, wanted = 2.0, Wanted()

    def __init__(self, total: int, size: tuple[int, int]) -> None:
        self.total, self.size = total, size

    def frames(self, indices: Sequence[int], width: int, height: int, settings: dict[str, Any]) -> NDArray[np.uint8]:
        del settings
        return np.zeros((len(indices), height, width, 3), np.uint8)


def processors_of(checkpoint: Checkpoint) -> dict[str, tuple[Processor, int]]:
    """Of a model with a tower of ours, by kind, and the token that stands for what each makes; none where this machine
    has no library for them, or the checkpoint's folder says nothing."""
    facts = family(checkpoint.model_type).vision if checkpoint.model_type in FAMILIES.names() else None
    if facts is None or checkpoint.seen is not None or importlib.util.find_spec("PIL") is None:
        return {}
    settings, more, video = settings_in(checkpoint.path)
    about = Facts(checkpoint.config, settings, lambda token: f"<{token}>", more, video)
    try:
        made = PROCESSORS.get(facts["processor"])(about)
        return {kind: (made[kind], int(checkpoint.config[facts[kind]])) for kind in KINDS if kind in facts}
    except (AttributeError, LookupError, TypeError, ValueError):
        return {}  # the door refuses such a checkpoint


def sources(kind: str) -> Iterator[Any]:
    """What processors of a kind take."""
    if kind == "audio":
        yield from (np.zeros(int(seconds * RATE), np.float32) for seconds in SECONDS)
    elif kind == "video":
        yield from (Film(total, size) for total in FRAMES for size in ((64, 48), (256, 192)))
    else:
        from PIL import Image

        for side in SIDES:
            yield from (Image.new("RGB", (side * wide, side)) for wide in (1, 2))


def media_of(processor: Processor, token: int, source: Any) -> Media:
    """As the engine is told of it. Raises ValueError for what this family does not take."""
    made = processor.make(source)
    starts = np.cumsum([0, *made.runs[:-1]]).tolist()
    return Media(
        digest=bytes(32), token=token, spans=list(zip(starts, made.runs, strict=True)), pixels=made.pixels.tobytes(),
        shape=made.pixels.shape, scale=list(made.scale), extra=list(made.extra), grids=list(made.grids),
        times=list(made.times), mingled=made.mingled,
    )  # fmt: skip


def encode_all(checkpoint: Checkpoint, tower: Tower, ops: Ops) -> None:
    """Run a tower over media of all sizes, each by itself, and over the smallest together."""
    pack = partial(PackedMemory, ops)
    for kind, (processor, token) in processors_of(checkpoint).items():
        found: dict[tuple[int, ...], Media] = {}
        for source in sources(kind):
            try:
                item = media_of(processor, token, source)
            except ValueError:
                continue
            found.setdefault((*item.shape, *item.extra), item)
        items = list(found.values())
        for some in [[item] for item in items] + [items[:2], items[:4]] * (len(items) > 1):
            tower.encode(some, pack)
