"""Qwen-Image: packed latents, prompts of any length under a mask, guidance that keeps the length of each token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from phloem.core.errors import BadRequest
from phloem.diffusion.family import TIMES, Family, Row, beside, negative_by_scale, packed, unpacked
from phloem.diffusion.request import Condition, Guidance

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from phloem.core.messages import Draw


class QwenImage(Family):
    block_lists = ("transformer_blocks",)
    sequences = block_lists
    teacache = (-4.5e02, 2.8e02, -4.5e01, 3.2e00, -2.0e-02)  # as vLLM-Omni has it for Qwen-Image

    def guidance(self, draw: Draw) -> Guidance:
        if draw.guidance is not None:
            raise BadRequest("guidance_scale: this model is guided by true_cfg_scale", param="guidance_scale")
        # The model is meant to be guided: where no negative prompt is sent, it is the model card's blank.
        usual = float(self.default("true_cfg_scale", 4.0))
        found = negative_by_scale(draw, "true_cfg_scale", usual)
        return Guidance(scale=found.scale, negative=draw.negative if draw.negative is not None else " ")

    def guide(self, positive: Tensor, negative: Tensor, scale: float) -> Tensor:
        guided = negative + scale * (positive - negative)
        return guided * (positive.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))

    def modulated(self, block: Any, given: dict[str, Any]) -> Tensor:
        scales = block.img_mod(given["temb"]).chunk(2, dim=-1)[0]
        return block._modulate(block.img_norm1(given["hidden_states"]), scales, given.get("modulate_index"))[0]

    def by_token(self, given: dict[str, Any], part: Callable[[Tensor, int], Tensor], tokens: int) -> dict[str, Any]:
        """Rotations of pictures and of texts are apart."""
        of_pictures, of_texts = given["image_rotary_emb"]
        given["image_rotary_emb"] = part(of_pictures, 0), of_texts
        if given.get("modulate_index") is not None:
            given["modulate_index"] = part(given["modulate_index"], 1)
        return given

    def encode(self, text: str) -> Condition:
        states, mask = self.pipe.encode_prompt(prompt=text, device=self.device, max_sequence_length=self.max_text)
        states_SE = states[0] if mask is None else states[0][mask[0].bool()]
        return Condition(states_SE, None, int(states_SE.shape[0]))

    def noise(self, width: int, height: int, generator: torch.Generator) -> Tensor:
        factor, channels = self.grid // 2, self.transformer.config.in_channels // 4
        return packed(torch.randn((1, 1, channels, height // factor, width // factor), generator=generator)[0, 0])

    def forward(self, rows: Sequence[Row]) -> list[Tensor]:
        lengths = [row.condition.states_SE.shape[0] for row in rows]
        longest, width = max(lengths), rows[0].condition.states_SE.shape[1]
        states_BSE = torch.zeros(len(rows), longest, width, dtype=self.dtype, device=self.device)
        for at, row in enumerate(rows):
            states_BSE[at, : lengths[at]] = row.condition.states_SE
        mask = torch.arange(longest)[None] < torch.tensor(lengths)[:, None]
        first, latents_BLC = rows[0], self.stack(rows)
        shapes = [(first.height // self.grid, first.width // self.grid), *(first.seen.shapes if first.seen else ())]
        with self.around(rows):
            v_BLC = self.transformer(
                hidden_states=beside(rows, latents_BLC),
                timestep=self.times(rows).to(self.dtype) / TIMES,
                guidance=None,
                encoder_hidden_states=states_BSE,
                encoder_hidden_states_mask=None if min(lengths) == longest else mask.to(self.device),
                img_shapes=[[(1, *shape) for shape in shapes]] * len(rows),
                return_dict=False,
            )[0]
        return list(v_BLC[:, : latents_BLC.shape[1]].float())

    def latents_CHW(self, latents: Tensor, width: int, height: int) -> Tensor:
        return unpacked(latents, height // self.grid, width // self.grid)

    def to_pixels(self, z_CHW: Tensor) -> Tensor:
        config = self.vae.config
        mean, deviation = (torch.tensor(values).to(z_CHW) for values in (config.latents_mean, config.latents_std))
        z_CHW = z_CHW * deviation[:, None, None] + mean[:, None, None]
        return self.vae.decode(z_CHW[None, :, None], return_dict=False)[0][0, :, 0]


PAINTER = QwenImage
