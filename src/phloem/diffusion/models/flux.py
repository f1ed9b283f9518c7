"""FLUX.1 (dev, schnell and what is made of them): packed latents, guidance as an input, true guidance on request."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from phloem.core.errors import BadRequest
from phloem.diffusion.family import TIMES, Family, Row, beside, negative_by_scale, packed, unpacked
from phloem.diffusion.request import Condition, Guidance

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from phloem.core.messages import Draw


class Flux(Family):
    block_lists = ("transformer_blocks", "single_transformer_blocks")
    sequences = block_lists
    # As TeaCache's authors fitted it to FLUX.1-dev.
    teacache = (4.98651651e02, -2.83781631e02, 5.58554382e01, -3.82021401e00, 2.64230861e-01)

    def guidance(self, draw: Draw) -> Guidance:
        true = negative_by_scale(draw, "true_cfg_scale", None)
        distilled = self.transformer.config.guidance_embeds
        if not distilled and draw.guidance not in (None, 0.0, 1.0):
            raise BadRequest("guidance_scale: this model was distilled to draw without", param="guidance_scale")
        scale = self.facts.guidance if draw.guidance is None else draw.guidance
        return Guidance(scale or 0.0 if distilled else 0.0, true.scale, true.negative)

    def modulated(self, block: Any, given: dict[str, Any]) -> Tensor:
        return block.norm1(given["hidden_states"], emb=given["temb"])[0]

    def encode(self, text: str) -> Condition:
        states, pooled, _ = self.pipe.encode_prompt(
            prompt=text, prompt_2=None, device=self.device, max_sequence_length=self.max_text
        )
        return Condition(states[0], pooled[0], self.text_tokens(self.pipe.tokenizer_2, text))

    def noise(self, width: int, height: int, generator: torch.Generator) -> Tensor:
        channels, factor = self.transformer.config.in_channels // 4, self.grid // 2
        return packed(torch.randn((1, channels, height // factor, width // factor), generator=generator)[0])

    def forward(self, rows: Sequence[Row]) -> list[Tensor]:
        first, latents_BLC = rows[0], self.stack(rows)
        states_BSE = torch.stack([row.condition.states_SE for row in rows]).to(self.dtype)
        pooled = [row.condition.pooled_E for row in rows]
        guidance = torch.tensor([row.embedded for row in rows], dtype=torch.float32, device=self.device)
        with self.around(rows):
            v_BLC = self.transformer(
                hidden_states=beside(rows, latents_BLC),
                timestep=self.times(rows).to(self.dtype) / TIMES,
                guidance=guidance if self.transformer.config.guidance_embeds else None,
                pooled_projections=torch.stack([item for item in pooled if item is not None]).to(self.dtype),
                encoder_hidden_states=states_BSE,
                txt_ids=torch.zeros(states_BSE.shape[1], 3, device=self.device, dtype=self.dtype),
                img_ids=self._all_places(first),
                return_dict=False,
            )[0]
        return list(v_BLC[:, : latents_BLC.shape[1]].float())

    def _all_places(self, row: Row) -> Tensor:
        """The picture's own, and behind them those of what it is made from."""
        found = [self._places(row.height // self.grid, row.width // self.grid)]
        for rows, columns in row.seen.shapes if row.seen is not None else ():
            found.append(self._places(rows, columns))
            found[-1][:, 0] = 1
        return torch.cat(found)

    def _places(self, rows: int, columns: int) -> Tensor:
        places = torch.zeros(rows, columns, 3, device=self.device, dtype=self.dtype)
        places[..., 1] = torch.arange(rows, device=self.device)[:, None]
        places[..., 2] = torch.arange(columns, device=self.device)[None]
        return places.reshape(rows * columns, 3)

    def latents_CHW(self, latents: Tensor, width: int, height: int) -> Tensor:
        return unpacked(latents, height // self.grid, width // self.grid)


PAINTER = Flux
