"""Pictures on their way to the engine: found, decoded, resized; the file name is the processor of a kind of towers.

Nothing here imports torch. Pillow and numpy do the work, in threads (`_reader.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from phloem.utils.registry import Registry

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from numpy.typing import NDArray


PLACES = "images"  # the feature of models that take pictures (`ModelInfo.features`)


@dataclass(frozen=True, slots=True)
class Picture:
    """What a processor made of one picture.

    `text` stands in the prompt where the picture's mark was, with one placeholder for each of the `runs`; a run is that
    many tokens.
    """

    pixels: NDArray[np.uint8]  # [pictures or tiles, height, width, 3]
    scale: tuple[float, ...]  # as in `core.media.Media`
    text: str
    runs: tuple[int, ...]
    extra: tuple[int, ...] = ()


class Processor(Protocol):
    """How one family reads pictures."""

    mark: str  # what chat templates write where a picture is
    inline: str  # the same with what stands around it, for templates that know no pictures
    placeholder: str  # the token that a picture's tokens are

    def make(self, image: Any, /) -> Picture:
        """Of a Pillow image in RGB. Raises ValueError for one that this family cannot take."""
        ...


@dataclass(frozen=True)
class Facts:
    """What a processor is made of."""

    config: dict[str, Any]  # config.json, as `Checkpoint.config` has it
    settings: dict[str, Any]  # preprocessor_config.json
    text_of: Callable[[int], str]  # a token's text
    more: dict[str, Any] = field(default_factory=dict)  # processor_config.json


class Maker(Protocol):
    """What a processor's file has."""

    def __call__(self, facts: Facts, /) -> Processor: ...


PROCESSORS: Registry[Maker] = Registry("phloem.multimodal", "picture processor", "build")
