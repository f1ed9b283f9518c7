"""Pictures, videos and sounds on their way to the engine: found, decoded, resized; the file name is the processor of a
kind of towers.

Nothing here imports torch. Pillow, PyAV and numpy do the work, in threads (`_reader.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from phloem.utils.registry import Registry

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from numpy.typing import NDArray


# Kinds of media, and the features of models that take them (`ModelInfo.features`).
KINDS = {"image": "images", "video": "videos", "audio": "sounds"}


@dataclass(frozen=True, slots=True)
class Picture:
    """What a processor made of one picture, video or sound.

    `text` stands in the prompt where its mark was, with one placeholder for each of the `runs`; a run is that many
    tokens. The other fields are those of `core.media.Media`.
    """

    pixels: NDArray[np.uint8]
    scale: tuple[float, ...]
    text: str
    runs: tuple[int, ...]
    extra: tuple[int, ...] = ()
    grids: tuple[tuple[int, int, int], ...] = ()
    times: tuple[int, ...] = ()
    mingled: int = 0
    beside: tuple[Picture, bytes] | None = None  # the sound of a video among its frames, and its digest


class Processor(Protocol):
    """How one family reads media of one kind."""

    mark: str  # what chat templates write where one is
    inline: str  # the same with what stands around it, for templates that know none
    placeholder: str  # the token that its tokens are

    def make(self, source: Any, /) -> Picture:
        """Of a Pillow image in RGB, an `_aside.Film`, or samples of 16 kHz (float32).

        Raises ValueError for one that this family cannot take."""
        ...


@dataclass(frozen=True)
class Facts:
    """What a processor is made of."""

    config: dict[str, Any]  # config.json, as `Checkpoint.config` has it
    settings: dict[str, Any]  # preprocessor_config.json
    text_of: Callable[[int], str]  # a token's text
    more: dict[str, Any] = field(default_factory=dict)  # processor_config.json
    video: dict[str, Any] = field(default_factory=dict)  # video_preprocessor_config.json


class Maker(Protocol):
    """What a processor's file has: its processors by kind."""

    def __call__(self, facts: Facts, /) -> dict[str, Processor]: ...


PROCESSORS: Registry[Maker] = Registry("phloem.multimodal", "processor of media", "build")
