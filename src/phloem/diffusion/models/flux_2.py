"""FLUX.2 (dev): tokens of 2 x 2 that the VAE's statistics scale, guidance as an input, pictures beside the new one."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from phloem.core.errors import BadRequest
from phloem.diffusion.family import TIMES, Family, Row, beside, image_of
from phloem.diffusion.request import Condition, Guidance, Seen

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from phloem.core.messages import Draw, Pixels
    from phloem.diffusion.request import Facts

MOST_PICTURES = 10  # as the model's makers have it
MOST_AREA = 1024 * 1024  # pixels of one that is read: larger ones are made smaller
APART = 10  # places in time between two pictures


class Flux2(Family):
    sequences = ("transformer_blocks", "single_transformer_blocks")

    def known(self, facts: Facts, defaults: dict[str, Any]) -> Facts:
        return replace(facts, pictures=MOST_PICTURES)

    def guidance(self, draw: Draw) -> Guidance:
        if draw.true_cfg is not None:
            raise BadRequest("true_cfg_scale: this model is guided by guidance_scale", param="true_cfg_scale")
        if draw.negative is not None:
            raise BadRequest("negative_prompt: this model was distilled to draw without", param="negative_prompt")
        return Guidance((self.facts.guidance if draw.guidance is None else draw.guidance) or 0.0)

    def encode(self, text: str) -> Condition:
        states, _ = self.pipe.encode_prompt(prompt=text, device=self.device, max_sequence_length=self.max_text)
        return Condition(states[0], None, int(states.shape[1]))

    def noise(self, width: int, height: int, generator: torch.Generator) -> Tensor:
        sides = height // self.grid, width // self.grid
        noise = torch.randn((1, int(self.transformer.config.in_channels), *sides), generator=generator)
        return noise[0].flatten(1).T.contiguous()

    def _set_schedule(self, steps: int, tokens: int) -> None:
        from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

        mu = compute_empirical_mu(tokens, steps)
        if self.scheduler.config.get("use_flow_sigmas"):
            self.scheduler.set_timesteps(steps, mu=mu)
        else:
            self.scheduler.set_timesteps(
                sigmas=torch.linspace(1.0, 1 / steps, steps, dtype=torch.float64).numpy(), mu=mu
            )

    def seen(self, pictures: Sequence[Pixels]) -> Seen:
        processor, found, shapes = self.pipe.image_processor, list["Tensor"](), list[tuple[int, int]]()
        for picture in pictures:
            image = image_of(picture)
            try:
                processor.check_image_input(image)
            except ValueError as error:  # too small or too narrow for what the model was trained on
                raise BadRequest(f"image: {error}", param="image") from None
            if image.width * image.height > MOST_AREA:
                image = processor._resize_to_target_area(image, MOST_AREA)
            width, height = (side // self.grid * self.grid for side in image.size)
            pixels = processor.preprocess(image, height=height, width=width, resize_mode="crop")
            z_1CHW = self.pipe._encode_vae_image(pixels.to(self.device, self.vae.dtype), None)
            found.append(z_1CHW[0].flatten(1).T.float())
            shapes.append((height // self.grid, width // self.grid))
        return Seen(torch.cat(found), tuple(shapes))

    def forward(self, rows: Sequence[Row]) -> list[Tensor]:
        latents_BLC = self.stack(rows)
        states_BSE = torch.stack([row.condition.states_SE for row in rows]).to(self.dtype)
        guidance = torch.tensor([row.embedded for row in rows], dtype=torch.float32, device=self.device)
        with self.around(rows):
            v_BLC = self.transformer(
                hidden_states=beside(rows, latents_BLC),
                timestep=self.times(rows).to(self.dtype) / TIMES,
                guidance=guidance if self.transformer.config.guidance_embeds else None,
                encoder_hidden_states=states_BSE,
                txt_ids=self.pipe._prepare_text_ids(states_BSE).to(self.device),
                img_ids=self._all_places(rows[0])[None].expand(len(rows), -1, -1),
                return_dict=False,
            )[0]
        return list(v_BLC[:, : latents_BLC.shape[1]].float())

    def _all_places(self, row: Row) -> Tensor:
        """[tokens, 4] in time, rows, columns and texts: the picture's own, and behind them those of what it is made
        from."""
        shapes = [(row.height // self.grid, row.width // self.grid), *(row.seen.shapes if row.seen is not None else ())]
        found = [
            torch.cartesian_prod(torch.tensor([APART * at]), torch.arange(h), torch.arange(w), torch.arange(1))
            for at, (h, w) in enumerate(shapes)
        ]
        return torch.cat(found).to(self.device)

    def latents_CHW(self, latents: Tensor, width: int, height: int) -> Tensor:
        norm = self.vae.bn
        z_CHW = latents.T.reshape(-1, height // self.grid, width // self.grid)
        mean, deviation = norm.running_mean, torch.sqrt(norm.running_var + self.vae.config.batch_norm_eps)
        z_CHW = z_CHW * deviation.to(z_CHW)[:, None, None] + mean.to(z_CHW)[:, None, None]
        return self.pipe._unpatchify_latents(z_CHW[None])[0]

    def to_pixels(self, z_CHW: Tensor) -> Tensor:
        return self.vae.decode(z_CHW[None], return_dict=False)[0][0]


PAINTER = Flux2
