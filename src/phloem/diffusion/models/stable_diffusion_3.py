"""Stable Diffusion 3 and 3.5: latents as a picture, three text encoders, guidance by a second row."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from phloem.core.errors import BadRequest
from phloem.diffusion.family import Family, Row
from phloem.diffusion.request import Condition, Guidance

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from phloem.core.messages import Draw


class StableDiffusion3(Family):
    block_lists = ("transformer_blocks",)
    sequences = block_lists
    attentions = ("attn", "attn2")  # some have one of the picture alone as well
    texts_first = False

    @property
    def grid(self) -> int:
        return int(self.pipe.vae_scale_factor) * int(self.transformer.config.patch_size)

    def guidance(self, draw: Draw) -> Guidance:
        if draw.true_cfg is not None:
            raise BadRequest("true_cfg_scale: this model is guided by guidance_scale", param="true_cfg_scale")
        most = self.transformer.config.pos_embed_max_size
        width, height = self.facts.size(draw)
        if most and max(width, height) // self.grid > most:
            raise BadRequest(f"size: a side has at most {most * self.grid} pixels with this model", param="size")
        return super().guidance(draw)

    def modulated(self, block: Any, given: dict[str, Any]) -> Tensor:
        return block.norm1(given["hidden_states"], emb=given["temb"])[0]

    def encode(self, text: str) -> Condition:
        states, _, pooled, _ = self.pipe.encode_prompt(
            prompt=text,
            prompt_2=None,
            prompt_3=None,
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_text,
        )
        return Condition(states[0], pooled[0], self.text_tokens(self.pipe.tokenizer_3 or self.pipe.tokenizer, text))

    def _set_schedule(self, steps: int, tokens: int) -> None:
        if self.scheduler.config.get("use_dynamic_shifting"):
            self.scheduler.set_timesteps(steps, mu=self.shift(tokens, 1.16))
        else:
            self.scheduler.set_timesteps(steps)

    def noise(self, width: int, height: int, generator: torch.Generator) -> Tensor:
        factor, channels = int(self.pipe.vae_scale_factor), self.transformer.config.in_channels
        return torch.randn((1, channels, height // factor, width // factor), generator=generator)[0]

    def forward(self, rows: Sequence[Row]) -> list[Tensor]:
        pooled = [row.condition.pooled_E for row in rows]
        with self.around(rows):
            v_BCHW = self.transformer(
                hidden_states=self.stack(rows),
                timestep=self.times(rows),
                encoder_hidden_states=torch.stack([row.condition.states_SE for row in rows]).to(self.dtype),
                pooled_projections=torch.stack([item for item in pooled if item is not None]).to(self.dtype),
                return_dict=False,
            )[0]
        return list(v_BCHW.float())


PAINTER = StableDiffusion3
