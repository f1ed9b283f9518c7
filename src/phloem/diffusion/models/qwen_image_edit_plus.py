"""Qwen-Image-Edit-2509 and later: several pictures, which the text encoder sees smaller than the VAE does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from phloem.diffusion.family import image_of
from phloem.diffusion.models import qwen_image_edit
from phloem.diffusion.models.qwen_image_edit import QwenImageEdit, sides

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from phloem.core.messages import Pixels

SEEN_AREA = 384 * 384  # pixels at which the text encoder sees a picture


class QwenImageEditPlus(QwenImageEdit):
    most_pictures = 3  # as the model card has it

    def shown(self, pictures: Sequence[Pixels]) -> Any:
        sizes = [sides(picture, SEEN_AREA) for picture in pictures]
        resize = self.pipe.image_processor.resize
        return [resize(image_of(one), height, width) for one, (width, height) in zip(pictures, sizes, strict=True)]

    def pixels_1CHW(self, picture: Pixels) -> Tensor:
        width, height = sides(picture, qwen_image_edit.READ_AREA)
        return self.pipe.image_processor.preprocess(image_of(picture), height, width)


PAINTER = QwenImageEditPlus
