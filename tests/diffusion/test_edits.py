"""Pictures made of pictures, against their diffusers pipelines on tiny random weights."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import numpy as np
import pytest

pytest.importorskip("diffusers", reason="pictures need diffusers: pip install 'phloem[diffusion]'")
pytest.importorskip("transformers")

import torch

from phloem.checkpoint.pictures import pictures_of
from phloem.core.messages import Draw, FromEngine, Painted, Pixels
from phloem.diffusion import models, probe
from phloem.diffusion.engine import Settings, Studio
from phloem.diffusion.family import image_of
from phloem.diffusion.models import qwen_image_edit, qwen_image_edit_plus
from phloem.diffusion.models._whole import Whole
from phloem.testing.pictures import qwen_image_edit as tiny_edit
from phloem.testing.pictures import tiny_pictures

pytestmark = pytest.mark.slow
CPU = torch.device("cpu")
SMALL = 64 * 64  # pixels at which pictures are read here


def picture(width: int, height: int, seed: int = 0) -> Pixels:
    found = np.random.default_rng(seed).integers(0, 256, width * height * 3, dtype=np.uint8)
    return Pixels(width, height, found.tobytes())


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Generator[None]:
    """Pictures are read at a megapixel: here by both sides at less, and by one thread."""
    from diffusers.pipelines.flux import pipeline_flux_kontext as kontext
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit as edit
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as plus

    monkeypatch.setattr(kontext, "PREFERRED_KONTEXT_RESOLUTIONS", [(48, 24), (32, 32), (24, 48)])
    theirs = edit.calculate_dimensions
    monkeypatch.setattr(edit, "calculate_dimensions", lambda area, ratio: theirs(SMALL, ratio))
    monkeypatch.setattr(plus, "CONDITION_IMAGE_SIZE", SMALL // 2)
    monkeypatch.setattr(plus, "VAE_IMAGE_SIZE", SMALL)
    monkeypatch.setattr(qwen_image_edit, "READ_AREA", SMALL)
    monkeypatch.setattr(qwen_image_edit_plus, "SEEN_AREA", SMALL // 2)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


_PIPES: dict[str, Any] = {}
EDITS = {"qwen_image_edit": "QwenImageEditPipeline", "qwen_image_edit_plus": "QwenImageEditPlusPipeline"}


@pytest.fixture(scope="module")
def pipes(tmp_path_factory: pytest.TempPathFactory) -> Any:
    def of(family: str) -> Any:
        if family in EDITS:
            _PIPES.setdefault(family, tiny_edit(EDITS[family]))
        if family not in _PIPES:
            found = pictures_of(tiny_pictures(tmp_path_factory.mktemp(family), family))
            assert found is not None
            _PIPES[family] = models.load(found, CPU, torch.float32, tiling=False)
        return _PIPES[family]

    yield of
    _PIPES.clear()


class Run:
    def __init__(self, pipe: Any) -> None:
        self.told: list[FromEngine] = []
        painter, why = models.choose(pipe, CPU, torch.float32, {"size": (32, 32), "steps": 3})
        assert not isinstance(painter, Whole), why
        self.painter = painter
        self.studio = Studio(painter, Settings(budget=1 << 20), self.told.append)
        self.latents: dict[str, torch.Tensor] = {}

    def submit(self, key: str, pictures: list[Pixels], **fields: Any) -> None:
        self.studio.submit(Draw(id=key, prompt=fields.pop("prompt", "a red cat"), pictures=pictures, **fields))

    def steps(self, count: int = 1 << 20) -> None:
        while count and self.studio.step():
            count -= 1
            self.latents |= {job.id: job.latents for job in self.studio.jobs.values() if job.latents is not None}

    def last(self, key: str) -> Painted:
        return next(one for one in reversed(self.told) if isinstance(one, Painted) and one.id == key)

    def pixels(self, key: str) -> Any:
        found = self.last(key)
        assert not found.error, found.error
        return np.frombuffer(found.pixels, np.uint8).reshape(found.height, found.width, 3).astype(int)


CASES: list[tuple[str, int, dict[str, Any], dict[str, Any]]] = [
    ("flux_kontext", 1, {"guidance": 3.0}, {"guidance_scale": 3.0, "max_area": 32 * 24}),
    (
        "flux_kontext",
        1,
        {"guidance": 2.0, "true_cfg": 3.0, "negative": "a dog"},
        {"guidance_scale": 2.0, "true_cfg_scale": 3.0, "negative_prompt": "a dog", "max_area": 32 * 24},
    ),
    ("qwen_image_edit", 1, {"true_cfg": 3.0, "negative": "a dog"}, {"true_cfg_scale": 3.0, "negative_prompt": "a dog"}),
    ("qwen_image_edit_plus", 2, {"true_cfg": 3.0}, {"true_cfg_scale": 3.0, "negative_prompt": " "}),
]


@pytest.mark.parametrize(("family", "count", "ours", "theirs"), CASES)
def test_our_loop_changes_a_picture_as_the_pipeline_does(
    pipes: Any, family: str, count: int, ours: dict[str, Any], theirs: dict[str, Any]
) -> None:
    pipe, given = pipes(family), [picture(40, 30), picture(20, 50, 1)][:count]
    images = [image_of(one) for one in given]
    found: list[Any] = []
    for kind in ("latent", "np"):
        with torch.no_grad():
            made = pipe(
                image=images if family.endswith("plus") else images[0], prompt="a red cat", width=32, height=24,
                num_inference_steps=4, generator=torch.Generator().manual_seed(7), output_type=kind, **theirs,
            ).images  # fmt: skip
        found.append(made[0])
    run = Run(pipe)
    run.submit("a", given, seed=7, width=32, height=24, steps=4, **ours)
    run.steps()
    pixels = (found[1] * 255).round().astype(int)
    assert float((run.latents["a"] - found[0]).abs().max()) < 1e-5
    assert np.abs(run.pixels("a") - pixels).max() <= 1 and pixels.std() > 5
    assert run.last("a").seen_tokens > 0


@pytest.mark.parametrize("family", ["flux_kontext", "qwen_image_edit", "qwen_image_edit_plus"])
def test_pictures_of_one_shape_share_passes_and_are_what_they_are_alone(pipes: Any, family: str) -> None:
    pipe = pipes(family)
    jobs = [([picture(40, 30)], 3), ([picture(40, 30, 1)], 5), ([picture(20, 50, 2)], 3)]
    if family == "flux_kontext":
        jobs.append(([], 4))  # from a prompt alone
    alone, together, passes = Run(pipe), Run(pipe), list[int]()
    for at, (given, steps) in enumerate(jobs):
        alone.submit(str(at), given, seed=at, steps=steps, width=32, height=32)
        alone.steps()
    forward = together.painter.forward
    together.painter.forward = lambda rows: (passes.append(len({row.time for row in rows})), forward(rows))[1]  # type: ignore[method-assign]
    for at, (given, steps) in enumerate(jobs):
        together.submit(str(at), given, seed=at, steps=steps, width=32, height=32)
        together.steps(2)
    together.steps()
    assert max(passes) >= 2
    for at in range(len(jobs)):
        assert float((together.latents[str(at)] - alone.latents[str(at)]).abs().max()) < 2e-5
        assert np.abs(together.pixels(str(at)) - alone.pixels(str(at))).max() <= 1
    assert together.studio.conditions.misses <= 2 * len(jobs)


def test_the_size_that_nobody_asks_for_has_the_shape_of_the_picture(pipes: Any) -> None:
    run = Run(pipes("qwen_image_edit"))
    run.submit("a", [picture(80, 20)], seed=1)
    run.steps()
    assert run.pixels("a").shape == (16, 64, 3)
    one = picture(8, 8)
    for key, given, mask in (("image", [], None), ("image", [one, one], None), ("mask", [one], one)):
        run.submit("b", given, seed=1, mask=mask)
        assert (run.last("b").status, run.last("b").param) == (400, key)


@pytest.mark.parametrize("family", ["flux_kontext", "qwen_image_edit", "qwen_image_edit_plus"])
def test_the_probe_changes_a_grey_picture(pipes: Any, family: str) -> None:
    tokens, why = probe.budget(Run(pipes(family)).painter, lambda: None)
    assert tokens > 0 and "32x32" in why


def test_a_picture_is_changed_where_a_mask_says_by_a_pipeline_that_is_not_ours(pipes: Any) -> None:
    import diffusers

    parts = pipes("stable_diffusion").components
    made = diffusers.StableDiffusionInpaintPipeline(**parts, requires_safety_checker=False)
    made.set_progress_bar_config(disable=True)
    given, mask = picture(16, 16), Pixels(16, 16, bytes(16 * 8 * 3) + bytes([255]) * (16 * 8 * 3))
    painter, _ = models.choose(made, CPU, torch.float32, {"size": (16, 16)})
    told: list[FromEngine] = []
    studio = Studio(painter, Settings(budget=1), told.append)
    studio.submit(Draw(id="a", prompt="a cat", seed=7, steps=4, guidance=3.0, pictures=[given], mask=mask))
    while studio.step():
        pass
    with torch.no_grad():
        expected = made(
            prompt="a cat", image=image_of(given), mask_image=image_of(mask), width=16, height=16, guidance_scale=3.0,
            num_inference_steps=4, generator=torch.Generator().manual_seed(7), output_type="np",
        ).images[0]  # fmt: skip
    last = told[-1]
    assert isinstance(last, Painted) and not last.error, last
    shown = np.frombuffer(last.pixels, np.uint8).reshape(16, 16, 3).astype(int)
    assert np.abs(shown - (expected * 255).round()).max() <= 1
