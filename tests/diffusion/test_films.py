"""Films against their diffusers pipelines, on tiny random weights; films together against films alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("diffusers", reason="films need diffusers: pip install 'phloem[diffusion]'")
pytest.importorskip("transformers")

import torch

from phloem.checkpoint.pictures import pictures_of
from phloem.core.messages import Draw, FromEngine, Painted, Pixels
from phloem.diffusion import models, probe
from phloem.diffusion.engine import Settings, Studio
from phloem.diffusion.family import image_of
from phloem.diffusion.models._whole import Whole
from phloem.testing.films import KINDS, tiny_films

pytestmark = pytest.mark.slow
CPU = torch.device("cpu")
PICTURE = Pixels(40, 24, np.random.default_rng(0).integers(0, 256, 40 * 24 * 3, dtype=np.uint8).tobytes())
DEFAULTS = {"size": (32, 16), "frames": 5, "max_frames": 9, "steps": 3}
SIZE = {"width": 32, "height": 16}
LARGER = {"width": 64, "height": 32}  # LTX takes multiples of 32
SAME = {**SIZE, "num_frames": 5}
_PIPES: dict[str, Any] = {}


@pytest.fixture(scope="module")
def pipes(tmp_path_factory: pytest.TempPathFactory) -> Any:
    def of(kind: str) -> Any:
        if kind not in _PIPES:
            found = pictures_of(tiny_films(tmp_path_factory.mktemp(kind), kind))
            assert found is not None
            _PIPES[kind] = models.load(found, CPU, torch.float32, tiling=False)
        return _PIPES[kind]

    yield of
    _PIPES.clear()


@pytest.fixture(autouse=True)
def no_ftfy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pipeline of pictures mends mojibake by a package that need not be here."""
    from diffusers.pipelines.wan import pipeline_wan, pipeline_wan_i2v

    monkeypatch.setattr(pipeline_wan_i2v, "prompt_clean", pipeline_wan.prompt_clean)


class Run:
    """A studio that keeps each film's last latents."""

    def __init__(self, pipe: Any, **settings: Any) -> None:
        self.told: list[FromEngine] = []
        self.painter, self.why = models.choose(pipe, CPU, torch.float32, DEFAULTS)
        self.studio = Studio(self.painter, Settings(budget=1 << 20, **settings), self.told.append)
        self.latents: dict[str, torch.Tensor] = {}

    def submit(self, key: str, **fields: Any) -> None:
        self.studio.submit(Draw(id=key, prompt=fields.pop("prompt", "draw a red cat"), film=True, **fields))

    def steps(self, count: int = 1 << 20) -> None:
        while count and self.studio.step():
            count -= 1
            self.latents |= {job.id: job.latents for job in self.studio.jobs.values() if job.latents is not None}

    def news(self, key: str) -> list[Painted]:
        return [one for one in self.told if isinstance(one, Painted) and one.id == key]

    def film(self, key: str) -> Any:
        """[frames, height, width, 3]."""
        last = self.news(key)[-1]
        assert last.done and not last.error, last.error
        frames = [one for one in self.news(key) if one.frame >= 0]
        assert [one.frame for one in frames] == list(range(last.frames))
        found = np.frombuffer(b"".join(one.pixels for one in frames), np.uint8)
        return found.reshape(last.frames, last.height, last.width, 3).astype(int)


def reference(pipe: Any, seed: int, steps: int, **fields: Any) -> Any:
    """(latents, pixels) of the pipeline's own loop."""
    found: list[Any] = []
    for kind in ("latent", "np"):
        with torch.no_grad():
            frames = pipe(
                prompt="draw a red cat", num_inference_steps=steps, output_type=kind,
                generator=torch.Generator().manual_seed(seed), **{**SAME, **fields},
            ).frames  # fmt: skip
        found.append(frames[0])
    return found[0], (found[1] * 255).round().astype(int)


CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("wan", {"guidance": 4.0, "negative": "a dog"}, {"guidance_scale": 4.0, "negative_prompt": "a dog"}),
    ("wan", {"guidance": 1.0}, {"guidance_scale": 1.0}),
    ("wan_two", {"guidance": 4.0, "guidance_2": 2.0}, {"guidance_scale": 4.0, "guidance_scale_2": 2.0}),
    ("wan_first_frame", {"guidance": 3.0}, {"guidance_scale": 3.0}),
    (
        "wan_image_to_video",
        {"guidance": 3.0, "pictures": [PICTURE], **SIZE},
        {"guidance_scale": 3.0},
    ),
    (
        "ltx",
        {"guidance": 3.0, "negative": "a small dog on a river", **LARGER},
        {"guidance_scale": 3.0, "negative_prompt": "a small dog on a river", **LARGER},
    ),
    ("ltx_last_step", {"guidance": 1.0, **LARGER}, {"guidance_scale": 1.0, **LARGER}),
    ("ltx", {"guidance": 1.0, "fps": 8.0, **LARGER}, {"guidance_scale": 1.0, "frame_rate": 8, **LARGER}),
    (
        "ltx_image_to_video",
        {"guidance": 3.0, "negative": "a dog", "pictures": [PICTURE], "fps": 12.5, **LARGER},
        {"guidance_scale": 3.0, "negative_prompt": "a dog", "frame_rate": 12.5, **LARGER},
    ),
    ("hunyuan_video", {"guidance": 4.0}, {"guidance_scale": 4.0}),
    (
        "hunyuan_video",
        {"guidance": 2.0, "true_cfg": 3.0, "negative": "a small dog on a river", "prompt": "draw a red cat"},
        {"guidance_scale": 2.0, "true_cfg_scale": 3.0, "negative_prompt": "a small dog on a river"},
    ),
]


@pytest.mark.parametrize(("kind", "ours", "theirs"), CASES, ids=lambda value: value if isinstance(value, str) else "")
def test_our_loop_makes_the_film_that_the_pipeline_makes(
    pipes: Any, kind: str, ours: dict[str, Any], theirs: dict[str, Any]
) -> None:
    pipe = pipes(kind)
    if "pictures" in ours:
        theirs = {**theirs, "image": image_of(PICTURE)}
    latents, pixels = reference(pipe, 7, 4, **theirs)
    run = Run(pipe)
    assert not isinstance(run.painter, Whole), run.why
    run.submit("a", seed=7, steps=4, **ours)
    run.steps()
    assert float((run.latents["a"] - latents).abs().max()) < 1e-5
    assert run.film("a").shape == (5, ours.get("height", 16), ours.get("width", 32), 3)
    assert np.abs(run.film("a") - pixels).max() <= 1
    assert pixels.std() > 5


def test_a_first_frame_begins_the_film_as_in_the_pipeline_of_pictures(pipes: Any) -> None:
    import diffusers

    pipe = pipes("wan_first_frame")
    parts = {name: part for name, part in pipe.components.items() if name != "transformer_2"}
    made = diffusers.WanImageToVideoPipeline(**parts, image_encoder=None, image_processor=None, expand_timesteps=True)
    made.set_progress_bar_config(disable=True)
    latents, pixels = reference(made, 7, 4, guidance_scale=3.0, image=image_of(PICTURE))
    run = Run(pipe)
    run.submit("a", seed=7, steps=4, guidance=3.0, pictures=[PICTURE], width=32, height=16)
    run.steps()
    assert float((run.latents["a"][:, 1:] - latents[:, 1:]).abs().max()) < 1e-5
    assert np.abs(run.film("a") - pixels).max() <= 1


@pytest.mark.parametrize("kind", ["ltx", "ltx_last_step"])
def test_a_folder_of_ltx_begins_films_with_pictures_as_the_pipeline_of_pictures_does(pipes: Any, kind: str) -> None:
    import diffusers

    pipe = pipes(kind)
    made = diffusers.LTXImageToVideoPipeline(**pipe.components)
    made.set_progress_bar_config(disable=True)
    latents, pixels = reference(made, 7, 4, guidance_scale=3.0, image=image_of(PICTURE), **LARGER)
    run = Run(pipe)
    run.submit("a", seed=7, steps=4, guidance=3.0, pictures=[PICTURE], **LARGER)
    run.submit("without", seed=7, steps=4, guidance=3.0, **LARGER)
    run.steps()
    assert float((run.latents["a"] - latents).abs().max()) < 1e-5
    assert np.abs(run.film("a") - pixels).max() <= 1
    assert float((run.latents["a"] - run.latents["without"]).abs().max()) > 0.1


def test_films_for_different_rates_share_passes_and_differ(pipes: Any) -> None:
    """A rate that is not said is the model's own."""
    pipe, rates = pipes("ltx"), [8.0, 25.0, 0.0, 60.0]
    alone, together, passes = Run(pipe), Run(pipe), list[int]()
    forward = together.painter.forward  # type: ignore[union-attr]
    together.painter.forward = lambda rows: (passes.append(len(rows)), forward(rows))[1]  # type: ignore[union-attr, method-assign]
    for at, rate in enumerate(rates):
        for run in (alone, together):
            run.submit(str(at), seed=1, steps=3, guidance=1.0, fps=rate, **LARGER)
        alone.steps()
    together.steps()
    assert set(passes) == {len(rates)}
    for at in range(len(rates)):
        assert float((together.latents[str(at)] - alone.latents[str(at)]).abs().max()) < 2e-5
    assert torch.equal(alone.latents["1"], alone.latents["2"])
    for one, other in ((0, 1), (1, 3)):
        assert float((alone.latents[str(one)] - alone.latents[str(other)]).abs().max()) > 1e-3


@pytest.mark.parametrize("kind", ["wan_two", "wan_first_frame", "ltx", "ltx_image_to_video", "hunyuan_video"])
def test_films_at_different_steps_share_passes_and_are_what_they_are_alone(pipes: Any, kind: str) -> None:
    pipe, fields = pipes(kind), [{"seed": 1, "steps": 3}, {"seed": 2, "steps": 5, "guidance": 1.0}, {"seed": 3}]
    if kind in ("ltx", "ltx_image_to_video", "hunyuan_video"):
        size = SIZE if kind == "hunyuan_video" else LARGER
        for at, prompt in enumerate(("a cat", "a small red dog on a river in the house", "")):
            fields[at] |= {**size, "prompt": prompt}  # type: ignore[operator]
            if kind == "ltx_image_to_video":
                fields[at]["pictures"] = [PICTURE]  # type: ignore[assignment]
    if kind == "hunyuan_video":
        fields[0] |= {"true_cfg": 3.0, "negative": "a dog in the house"}  # type: ignore[dict-item]
    alone = Run(pipe)
    for at, one in enumerate(fields):
        alone.submit(str(at), **one)  # type: ignore[arg-type]
        alone.steps()
    together, passes = Run(pipe), list[int]()
    forward = together.painter.forward  # type: ignore[union-attr]
    together.painter.forward = lambda rows: (passes.append(len({row.time for row in rows})), forward(rows))[1]  # type: ignore[union-attr, method-assign]
    for at, one in enumerate(fields):
        together.submit(str(at), **one)  # type: ignore[arg-type]
        together.steps(2)
    together.steps()
    assert max(passes) >= 2
    for at in range(len(fields)):
        assert float((together.latents[str(at)] - alone.latents[str(at)]).abs().max()) < 2e-5
        assert np.abs(together.film(str(at)) - alone.film(str(at))).max() <= 1


def test_a_film_is_taken_up_with_a_word_and_what_cannot_be_made_names_its_field(pipes: Any) -> None:
    run = Run(pipes("wan"))
    run.submit("a", seed=1, steps=2)
    (word,) = run.news("a")
    assert (word.done, word.steps, word.frames, word.width) == (False, 2, 5, 32)
    for field, fields in (
        ("num_frames", {"frames": 6}),
        ("num_frames", {"frames": 13}),
        ("size", {"width": 40, "height": 16}),
        ("input_reference", {"pictures": [PICTURE]}),
        ("guidance_scale_2", {"guidance_2": 2.0}),
        ("mask", {"mask": PICTURE}),
    ):
        run.submit(field, seed=1, **fields)  # type: ignore[arg-type]
        assert (run.news(field)[-1].status, run.news(field)[-1].param) == (400, field)
    run.studio.submit(Draw(id="p", prompt="a cat", seed=1))
    assert "/v1/videos" in run.news("p")[-1].error
    for kind in ("wan_image_to_video", "ltx_image_to_video"):
        run = Run(pipes(kind))
        run.submit("a", seed=1, **(LARGER if kind.startswith("ltx") else {}))
        assert run.news("a")[-1].param == "input_reference"
    run = Run(pipes("hunyuan_video"))
    for field, fields in (
        ("guidance_scale_2", {"guidance_2": 2.0}),
        ("true_cfg_scale", {"true_cfg": 2.0}),
        ("input_reference", {"pictures": [PICTURE]}),
        ("num_frames", {"frames": 4}),
    ):
        run.submit(field, seed=1, **fields)  # type: ignore[arg-type]
        assert (run.news(field)[-1].status, run.news(field)[-1].param) == (400, field)


def test_a_film_of_a_pipeline_that_is_not_ours_is_made_whole_and_ended_between_steps(pipes: Any) -> None:
    import diffusers

    pipe = pipes("wan")
    kept, pipe.scheduler = (
        pipe.scheduler,
        diffusers.DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
    )
    try:
        _, pixels = reference(pipe, 7, 3, guidance_scale=3.0)
        run = Run(pipe)
        assert isinstance(run.painter, Whole) and "DPMSolver" in run.why.reason
        for key in "ab":
            run.submit(key, seed=7, steps=3, guidance=3.0)

        def cancel() -> None:
            if "b" in run.studio.jobs and run.studio.jobs["b"].step == 1:
                run.studio.abort("b")

        while run.studio.step(cancel):
            pass
    finally:
        pipe.scheduler = kept
    assert np.abs(run.film("a") - pixels).max() <= 1
    assert [one.step for one in run.news("b")] == [0, 1]


@pytest.mark.parametrize("kind", list(KINDS))
def test_the_probe_makes_a_short_film(pipes: Any, kind: str) -> None:
    painter = models.choose(pipes(kind), CPU, torch.float32, DEFAULTS)[0]
    assert not isinstance(painter, Whole)
    tokens, why = probe.budget(painter, lambda: None)
    assert tokens % 4 == 0 and "32x16 with 5 frames" in why
