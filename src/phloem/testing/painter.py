"""A family of pictures without a model: each row depends on itself alone, and fails where a test says so."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from phloem.core.errors import BadRequest
from phloem.diffusion.family import Family, Row
from phloem.diffusion.parts import Parts
from phloem.diffusion.request import Condition, Facts, Guidance

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from phloem.core.messages import Draw


class ToyPainter(Family):
    """Latents [3, height, width]; v moves them towards the mean of the prompt's bytes.

    `batches`: the rows of every forward pass so far. A prompt with "nan" gives no numbers, one with "broken" raises; a
    pass of more than `memory` latent tokens finds none.
    """

    def __init__(self, memory: int = 1 << 30, mixed_sizes: bool = False) -> None:
        self.device, self.dtype = torch.device("cpu"), torch.float32
        self.facts = Facts("toy", 1, 4, 4, 8, 3.0, 4096)
        self.parts = Parts({}, self.device, offload=False)
        self.memory = memory
        self._mixed = mixed_sizes
        self.batches: list[int] = []
        self.encoded: list[str] = []

    @property
    def grid(self) -> int:
        return 1

    def key(self, width: int, height: int, conditions: Sequence[Condition]) -> Any:
        return () if self._mixed else (width, height)

    def guidance(self, draw: Draw) -> Guidance:
        if draw.true_cfg is not None:
            raise BadRequest("true_cfg_scale: none here", param="true_cfg_scale")
        return super().guidance(draw)

    def encode(self, text: str) -> Condition:
        self.encoded.append(text)
        if "unreadable" in text:
            raise RuntimeError("this text cannot be encoded")
        value = sum(text.encode()) % 97 / 97 if "nan" not in text else float("nan")
        return Condition(torch.full((1, 1), value), None, len(text.split())) if "broken" not in text else BROKEN

    def noise(self, width: int, height: int, generator: torch.Generator) -> Tensor:
        return torch.randn((3, height, width), generator=generator)

    def schedule(self, steps: int, tokens: int) -> tuple[list[float], list[float]]:
        sigmas = [1 - at / steps for at in range(steps + 1)]
        return sigmas, [1000 * sigma for sigma in sigmas[:-1]]

    def forward(self, rows: Sequence[Row]) -> list[Tensor]:
        if sum(row.width * row.height for row in rows) > self.memory:
            raise torch.OutOfMemoryError("no memory for so many rows")
        if any(row.condition is BROKEN for row in rows):
            raise RuntimeError("one of the rows is broken")
        self.batches.append(len(rows))
        return [(row.latents - row.condition.states_SE.item()) * (row.time / 1000) for row in rows]

    def decode(self, latents: Tensor, width: int, height: int) -> NDArray[np.uint8]:
        return ((latents / 4 + 0.5).clamp(0, 1).permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)


BROKEN = Condition(torch.zeros(1, 1))
