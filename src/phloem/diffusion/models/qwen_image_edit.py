"""Qwen-Image-Edit: the text encoder sees the picture to be changed, whose latents stand behind the new one's."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from phloem.diffusion.family import image_of, packed
from phloem.diffusion.models.qwen_image import QwenImage
from phloem.diffusion.request import Condition, Seen

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from phloem.core.messages import Pixels
    from phloem.diffusion.request import Facts

READ_AREA = 1024 * 1024  # pixels at which a picture is read, whatever its size
STEP = 32  # pixels: sides are multiples of it


class QwenImageEdit(QwenImage):
    reads_pictures = True
    most_pictures = 1

    def known(self, facts: Facts, defaults: dict[str, Any]) -> Facts:
        return replace(facts, pictures=self.most_pictures, needs_pictures=True)

    def encode_seeing(self, text: str, pictures: Sequence[Pixels]) -> Condition:
        states, mask = self.pipe.encode_prompt(prompt=text, image=self.shown(pictures), device=self.device)
        states_SE = states[0] if mask is None else states[0][mask[0].bool()]
        return Condition(states_SE, None, int(states_SE.shape[0]))

    def shown(self, pictures: Sequence[Pixels]) -> Any:
        """What the text encoder sees."""
        return self._resized(pictures[0])

    def _resized(self, picture: Pixels) -> Any:
        width, height = sides(picture, READ_AREA)
        return self.pipe.image_processor.resize(image_of(picture), height, width)

    def pixels_1CHW(self, picture: Pixels) -> Tensor:
        """What the VAE compresses."""
        width, height = sides(picture, READ_AREA)
        return self.pipe.image_processor.preprocess(self._resized(picture), height, width)

    def compressed(self, picture_1CHW: Tensor) -> Tensor:
        config = self.vae.config
        found = self.vae.encode(picture_1CHW[:, :, None].to(self.device, self.vae.dtype)).latent_dist.mode()
        z_CHW = found[0, :, 0].float()
        mean, deviation = (torch.tensor(values).to(z_CHW) for values in (config.latents_mean, config.latents_std))
        return (z_CHW - mean[:, None, None]) / deviation[:, None, None]

    def seen(self, pictures: Sequence[Pixels]) -> Seen:
        latents_CHW = [self.compressed(self.pixels_1CHW(picture)) for picture in pictures]
        shapes = tuple((z.shape[1] // 2, z.shape[2] // 2) for z in latents_CHW)
        return Seen(torch.cat([packed(z) for z in latents_CHW]), shapes)


def sides(picture: Pixels, area: int) -> tuple[int, int]:
    """(width, height) of about this area in the picture's shape."""
    shape = picture.width / picture.height
    width = (area * shape) ** 0.5
    return max(1, round(width / STEP)) * STEP, max(1, round(width / shape / STEP)) * STEP


PAINTER = QwenImageEdit
