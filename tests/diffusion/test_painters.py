"""Each family against its diffusers pipeline, on tiny random weights; rows of all kinds together against rows alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("diffusers", reason="pictures need diffusers: pip install 'phloem[diffusion]'")
pytest.importorskip("transformers")

import torch

from phloem.checkpoint.describe import describe
from phloem.checkpoint.pictures import pictures_of
from phloem.core.errors import ConfigError, ModelLoadError
from phloem.core.messages import Draw, FromEngine, Painted
from phloem.diffusion import models, probe
from phloem.diffusion.engine import Settings, Studio
from phloem.diffusion.family import Family
from phloem.diffusion.models._whole import Whole
from phloem.launch.pictures import check_fit, defaults
from phloem.llm import Engine
from phloem.testing.pictures import KINDS, tiny_pictures

pytestmark = pytest.mark.slow
OURS = [name for name in KINDS if name in models.FAMILIES.names() and name != "flux_kontext"]
CPU = torch.device("cpu")
NAMES = {"guidance": "guidance_scale", "true_cfg": "true_cfg_scale", "negative": "negative_prompt"}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("flux", {"guidance": 3.0}),
    ("flux", {"guidance": 2.0, "true_cfg": 4.0, "negative": "a small dog"}),
    ("qwen_image", {"true_cfg": 3.0, "negative": "a small dog on a river"}),
    ("qwen_image", {"true_cfg": 1.0}),
    ("stable_diffusion_3", {"guidance": 5.0, "negative": "a dog"}),
    ("stable_diffusion_3", {"guidance": 1.0}),
    ("z_image", {"guidance": 3.0, "negative": "a dog"}),
    ("z_image", {"guidance": 0.0}),
]
_PIPES: dict[str, Any] = {}


@pytest.fixture(scope="module")
def pipes(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A family's pipeline by its name, made once."""

    def of(family: str) -> Any:
        if family not in _PIPES:
            folder = tiny_pictures(tmp_path_factory.mktemp(family), family)
            found = pictures_of(folder)
            assert found is not None
            _PIPES[family] = models.load(found, CPU, torch.float32, tiling=False)
        return _PIPES[family]

    yield of
    _PIPES.clear()


def painter_of(pipe: Any) -> Any:
    return models.choose(pipe, CPU, torch.float32, {"size": (16, 16)})[0]


class Run:
    """A studio that keeps each picture's last latents."""

    def __init__(self, painter: Any, budget: int = 1 << 20, **settings: Any) -> None:
        self.told: list[FromEngine] = []
        self.studio = Studio(painter, Settings(budget=budget, **settings), self.told.append)
        self.latents: dict[str, torch.Tensor] = {}

    def steps(self, count: int = 1 << 20) -> None:
        while count and self.studio.step():
            count -= 1
            for job in self.studio.jobs.values():
                if job.latents is not None:
                    self.latents[job.id] = job.latents

    def pixels(self, key: str) -> Any:
        (found,) = [one for one in self.told if isinstance(one, Painted) and one.id == key and one.done]
        assert not found.error, found.error
        return np.frombuffer(found.pixels, np.uint8).reshape(found.height, found.width, 3).astype(int)


def reference(pipe: Any, prompt: str, seed: int, width: int, height: int, steps: int, **fields: Any) -> Any:
    """(latents, pixels) of the pipeline's own loop."""
    given = {NAMES[name]: value for name, value in fields.items()}
    found: list[Any] = []
    for kind in ("latent", "np"):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            images = pipe(
                prompt=prompt, width=width, height=height, num_inference_steps=steps, generator=generator,
                output_type=kind, **given,
            ).images  # fmt: skip
        found.append(images[0])
    return found[0], (found[1] * 255).round().astype(int)


@pytest.mark.parametrize(("family", "fields"), CASES, ids=str)
def test_our_loop_draws_what_the_pipeline_draws(pipes: Any, family: str, fields: dict[str, Any]) -> None:
    pipe = pipes(family)
    latents, pixels = reference(pipe, "draw a red cat", 7, 24, 16, 4, **fields)
    run = Run(painter_of(pipe))
    run.studio.submit(Draw(id="a", prompt="draw a red cat", seed=7, width=24, height=16, steps=4, **fields))
    run.steps()
    assert float((run.latents["a"] - latents).abs().max()) < 1e-5
    assert np.abs(run.pixels("a") - pixels).max() <= 1
    assert pixels.std() > 5  # a picture, and not one colour


@pytest.mark.parametrize("family", OURS)
def test_rows_of_all_kinds_in_one_pass_are_rows_alone(pipes: Any, family: str) -> None:
    """Different steps, guidance, prompt lengths and seeds, joining between steps; sizes where the family takes them."""
    name = "true_cfg" if family == "qwen_image" else "guidance"
    draws = [
        Draw(id="a", prompt="a cat", seed=1, width=16, height=16, steps=3, **{name: 3.0}, negative="a dog"),
        Draw(id="b", prompt="a large red house on the river with a small tree", seed=2, width=16, height=16, steps=6),
        Draw(id="c", prompt="draw a leaf", seed=3, width=16, height=16, steps=4, **{name: 6.0}),
        Draw(id="d", prompt="a root", seed=3, width=24, height=16, steps=4, **{name: 6.0}),
    ]
    if family == "flux":
        draws[0].true_cfg = 3.0
    painter = painter_of(pipes(family))
    alone = {one.id: Run(painter) for one in draws}
    for one in draws:
        alone[one.id].studio.submit(one)
        alone[one.id].steps()
    together, calls = Run(painter), list[int]()
    forward = painter.forward
    painter.forward = lambda rows: (calls.append(len({(row.width, row.time) for row in rows})), forward(rows))[1]
    for one in draws:
        together.studio.submit(one)
        together.steps(2)
    together.steps()
    assert max(calls) >= 3  # rows at different steps (and sizes) were in one pass
    for one in draws:
        assert float((together.latents[one.id] - alone[one.id].latents[one.id]).abs().max()) < 2e-5
        assert np.abs(together.pixels(one.id) - alone[one.id].pixels(one.id)).max() <= 1


def test_a_pipeline_that_is_not_ours_runs_whole_with_progress_and_is_ended_between_steps(pipes: Any) -> None:
    pipe = pipes("stable_diffusion")
    painter, why = models.choose(pipe, CPU, torch.float32, {})
    assert why.value == "whole pipeline" and "no family" in why.reason
    _, pixels = reference(pipe, "draw a red cat", 7, 16, 16, 4, guidance=5.0)
    run = Run(painter)
    for key in "abc":
        run.studio.submit(Draw(id=key, prompt="draw a red cat", seed=7, width=16, height=16, steps=4, guidance=5.0))

    def cancel() -> None:
        if run.studio.jobs.get("b") is not None and run.studio.jobs["b"].step == 2:
            run.studio.abort("b")

    while run.studio.step(cancel):
        pass
    assert np.abs(run.pixels("a") - pixels).max() <= 1
    assert (run.pixels("c") == run.pixels("a")).all()
    steps = {key: [one.step for one in run.told if isinstance(one, Painted) and one.id == key] for key in "abc"}
    assert steps["b"] == [1, 2] and steps["a"] == [1, 2, 3, 4, 4]


def test_another_schedule_is_declined_with_the_reason(pipes: Any) -> None:
    import diffusers

    pipe = pipes("stable_diffusion_3")
    kept = pipe.scheduler
    try:
        pipe.scheduler = diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0)
        _, why = models.choose(pipe, CPU, torch.float32, {})
    finally:
        pipe.scheduler = kept
    assert why.value == "whole pipeline" and "Heun" in why.reason


@pytest.mark.parametrize("family", OURS)
def test_the_probe_finds_a_budget_and_warms_every_stage(pipes: Any, family: str) -> None:
    painter = painter_of(pipes(family))
    assert isinstance(painter, Family)
    tokens, why = probe.budget(painter, lambda: None)
    assert tokens % painter.tokens(16, 16) == 0 and tokens > 0 and "16x16" in why


def test_tiles_give_the_same_small_picture(pipes: Any, tmp_path: Path) -> None:
    found = pictures_of(tiny_pictures(tmp_path, "flux"))
    assert found is not None
    tiled = models.load(found, CPU, torch.float32, tiling=True)
    assert tiled.vae.use_tiling
    shown: list[Any] = []
    for pipe in (pipes("flux"), tiled):
        run = Run(painter_of(pipe))
        run.studio.submit(Draw(id="a", prompt="a cat", seed=7, width=16, height=16, steps=2))
        run.steps()
        shown.append(run.pixels("a"))
    assert (shown[0] == shown[1]).all()


def test_folders_that_cannot_draw_say_why(tmp_path: Path) -> None:
    index = tmp_path / "model_index.json"
    for text, says in (
        ("{", "JSON"),
        ("{}", "_class_name"),
        ('{"_class_name": "FluxPipeline", "vae": ["diffusers", "AutoencoderKL"]}', "vae is missing"),
        ('{"_class_name": "FluxPipeline", "vae": ["my_code", "VAE"]}', "never run"),
    ):
        index.write_text(text)
        with pytest.raises(ModelLoadError, match=says):
            pictures_of(tmp_path)
    index.write_text('{"_class_name": "NoSuchPipeline"}')
    found = pictures_of(tmp_path)
    assert found is not None
    with pytest.raises(ModelLoadError, match="NoSuchPipeline is no pipeline"):
        models.load(found, CPU, torch.float32, tiling=False)


def test_only_what_draws_takes_such_a_folder(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(ConfigError, match="phloem generate"):
        describe(str(tmp_path))
    found = describe(str(tmp_path), draws=True)
    assert found.pictures is not None and found.pictures.class_name == "FluxPipeline"
    with pytest.raises(ModelLoadError, match="load_format"):
        describe(str(tmp_path), "gguf", draws=True)
    with pytest.raises(ConfigError, match="draws pictures"):
        Engine(model_path=str(tmp_path))


def test_what_needs_more_than_a_prompt_and_a_picture_is_refused() -> None:
    class Poses:
        def __call__(self, control_image: Any, prompt: str = "") -> None: ...

    class Edits:
        def __call__(self, image: Any, prompt: str = "") -> None: ...

    with pytest.raises(ModelLoadError, match="control_image"):
        Whole(Poses(), {})
    facts = Whole(Edits(), {}).facts
    assert facts.needs_pictures and facts.pictures == 1 and not facts.films


def test_class_names_are_file_names() -> None:
    assert models.key_of("StableDiffusion3Pipeline") == "stable_diffusion_3"
    assert models.key_of("ZImagePipeline") == "z_image"
    assert models.key_of("QwenImagePipeline") == "qwen_image"
    assert models.key_of("FluxPipeline") == "flux"
    assert models.key_of("StableDiffusionXLPipeline") == "stable_diffusion_xl"


def test_defaults_of_the_operator_are_checked() -> None:
    assert defaults('{"size": "64x32", "steps": 4, "guidance_scale": 0}')["size"] == (64, 32)
    steps = ('{"steps": "4"}', '{"steps": true}', '{"steps": -1}', '{"steps": 0}')
    others = ('{"max_pixels": 0}', '{"guidance_scale": NaN}', '{"guidance_scale": Infinity}')
    sizes = ('{"size": "8"}', '{"size": "0x8"}', '{"size": "²x8"}', '{"size": "8x' + 5000 * "8" + '"}')
    for text in ("[", "[]", 9999 * "[", '{"sise": "8x8"}', '{"fps": 1e300}', *sizes, *steps, *others):
        with pytest.raises(ConfigError):
            defaults(text)


def test_defaults_that_no_request_could_be_drawn_with_are_refused_at_the_start(pipes: Any) -> None:
    painter, _ = models.choose(pipes("z_image"), CPU, torch.float32, {"size": (17, 16)})
    with pytest.raises(ConfigError, match="image_defaults: size: 17x16"):
        check_fit(painter)
    painter, _ = models.choose(pipes("z_image"), CPU, torch.float32, {"steps": 5000})
    with pytest.raises(ConfigError, match="5000"):
        check_fit(painter)
    check_fit(models.choose(pipes("z_image"), CPU, torch.float32, {"size": (32, 32)})[0])


def test_a_prompt_or_a_side_beyond_the_models_places_is_no_fault_of_the_server(pipes: Any) -> None:
    pipe = pipes("z_image")
    painter = models.choose(pipe, CPU, torch.float32, {"max_pixels": 1 << 24})[0]
    places, most, _ = pipe.transformer.config.axes_lens
    told: list[FromEngine] = []
    made = Studio(painter, Settings(budget=1 << 20), told.append)
    side = painter.facts.grid
    made.submit(Draw(id="long", prompt="a cat " * 2000, seed=1, steps=1, width=side, height=side))
    made.submit(Draw(id="wide", prompt="a cat", seed=1, steps=1, width=side * (most + 1), height=side))
    while made.step():
        pass
    ends = {one.id: one for one in told if isinstance(one, Painted) and one.done}
    assert not ends["long"].error and ends["long"].text_tokens < places - 1
    assert (ends["wide"].status, ends["wide"].param) == (400, "size")
