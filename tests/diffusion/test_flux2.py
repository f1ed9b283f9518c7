"""FLUX.2, dev and Klein, against their diffusers pipelines on tiny random weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("diffusers", reason="pictures need diffusers: pip install 'phloem[diffusion]'")
pytest.importorskip("diffusers.pipelines.flux2.pipeline_flux2_klein", reason="an older diffusers")

import torch

from phloem.core.messages import Draw, FromEngine, Painted, Pixels
from phloem.diffusion import models
from phloem.diffusion.engine import Settings, Studio
from phloem.diffusion.family import image_of
from phloem.testing.flux2 import flux_2

pytestmark = pytest.mark.slow
CPU = torch.device("cpu")
FIRST, SECOND = (
    Pixels(w, h, np.random.default_rng(w).integers(0, 256, w * h * 3, dtype=np.uint8).tobytes())
    for w, h in ((72, 66), (64, 80))
)


class Run:
    def __init__(self, pipe: Any) -> None:
        self.told: list[FromEngine] = []
        painter, why = models.choose(pipe, CPU, torch.float32, {"size": (16, 16)})
        assert isinstance(painter, models.Family), why
        self.painter = painter
        self.studio = Studio(painter, Settings(budget=1 << 20), self.told.append)
        self.latents: dict[str, torch.Tensor] = {}

    def submit(self, key: str, seed: int = 7, steps: int = 3, **fields: Any) -> None:
        prompt = fields.pop("prompt", "draw a red cat")
        self.studio.submit(Draw(id=key, prompt=prompt, seed=seed, width=24, height=16, steps=steps, **fields))

    def steps(self, count: int = 1 << 20) -> None:
        while count and self.studio.step():
            count -= 1
            self.latents |= {job.id: job.latents for job in self.studio.jobs.values() if job.latents is not None}

    def last(self, key: str) -> Painted:
        return next(one for one in reversed(self.told) if isinstance(one, Painted) and one.id == key)


CASES: list[tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = [
    ("Flux2KleinPipeline", {}, {"guidance": 3.0}, {"guidance_scale": 3.0}),
    ("Flux2KleinPipeline", {"is_distilled": True}, {}, {"guidance_scale": 1.0}),
    ("Flux2KleinPipeline", {}, {"guidance": 1.0, "pictures": [FIRST, SECOND]}, {"guidance_scale": 1.0}),
    ("Flux2Pipeline", {}, {"guidance": 2.5}, {"guidance_scale": 2.5}),
]


@pytest.mark.parametrize(("kind", "options", "ours", "theirs"), CASES, ids=["klein", "distilled", "pictures", "dev"])
def test_our_loop_draws_what_the_pipeline_draws(
    kind: str, options: dict[str, Any], ours: dict[str, Any], theirs: dict[str, Any]
) -> None:
    pipe = flux_2(kind, **options)
    shown = {"image": [image_of(one) for one in ours["pictures"]]} if "pictures" in ours else {}
    found: list[Any] = []
    for output in ("latent", "np"):
        with torch.no_grad():
            made = pipe(
                prompt="draw a red cat", width=24, height=16, num_inference_steps=3, output_type=output,
                generator=torch.Generator().manual_seed(7), **theirs, **shown,
            ).images  # fmt: skip
        found.append(made[0])
    run = Run(pipe)
    run.submit("a", **ours)
    run.steps()
    last = run.last("a")
    assert not last.error, last.error
    latents = run.latents["a"]
    if kind == "Flux2KleinPipeline":  # gives them as the VAE reads them
        latents = run.painter.latents_CHW(latents, 24, 16)
    assert latents.shape == found[0].shape
    assert float((latents - found[0]).abs().max()) < 1e-5
    pixels = np.frombuffer(last.pixels, np.uint8).reshape(16, 24, 3).astype(int)
    assert np.abs(pixels - (found[1] * 255).round().astype(int)).max() <= 1 and pixels.std() > 5


def test_pictures_at_different_steps_share_passes_and_are_what_they_are_alone() -> None:
    pipe = flux_2()
    fields: list[dict[str, Any]] = [
        {"guidance": 3.0},
        {"guidance": 2.0, "steps": 5, "negative": "a dog", "prompt": "a small house on the river"},
        {"guidance": 1.0},
    ]
    alone, together, passes = Run(pipe), Run(pipe), list[int]()
    forward = together.painter.forward
    together.painter.forward = lambda rows: (passes.append(len({row.time for row in rows})), forward(rows))[1]  # type: ignore[method-assign]
    for at, one in enumerate(fields):
        for run in (alone, together):
            run.submit(str(at), seed=at, **one)
            run.steps(1 << 20 if run is alone else 2)
    together.steps()
    assert max(passes) >= 2
    for at in range(len(fields)):
        assert float((together.latents[str(at)] - alone.latents[str(at)]).abs().max()) < 2e-5


def test_what_a_distilled_model_does_not_take_is_refused_by_field() -> None:
    for pipe, field, given in (
        (flux_2("Flux2Pipeline"), "negative_prompt", {"negative": "a dog"}),
        (flux_2(is_distilled=True), "guidance_scale", {"guidance": 4.0}),
    ):
        run = Run(pipe)
        run.submit("a", **given)  # type: ignore[arg-type]
        assert (run.last("a").status, run.last("a").param) == (400, field)


@pytest.mark.parametrize("sides", [(63, 64), (65 * 9, 65)])
def test_a_picture_too_small_or_too_narrow_for_the_model_is_the_clients_fault(sides: tuple[int, int]) -> None:
    run = Run(flux_2())
    run.submit("a", pictures=[Pixels(*sides, bytes(sides[0] * sides[1] * 3))])
    run.steps()
    assert (run.last("a").status, run.last("a").param) == (400, "image")
    assert "{}×{}".format(*sides) in run.last("a").error
