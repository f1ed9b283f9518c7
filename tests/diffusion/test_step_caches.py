"""First-block caching: the decisions of diffusers' own, rows together as alone, nothing changed where it is off."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("diffusers", reason="pictures need diffusers: pip install 'phloem[diffusion]'")
pytest.importorskip("transformers")

import torch

from phloem.checkpoint.pictures import pictures_of
from phloem.core.messages import Draw, FromEngine, Painted
from phloem.diffusion import models
from phloem.diffusion.engine import Settings, Studio
from phloem.testing.films import tiny_films
from phloem.testing.pictures import tiny_pictures

pytestmark = pytest.mark.slow
CPU = torch.device("cpu")
# Random weights change far more from step to step than trained ones: thresholds that some steps are below.
FAMILIES = {"flux": 0.68, "qwen_image": 1.06, "stable_diffusion_3": 0.65, "wan_two": 0.54}
STEPS = 12


@pytest.fixture(autouse=True)
def one_thread() -> Generator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def load(folder: Path, family: str) -> Any:
    made = tiny_films(folder, family) if family.startswith("wan") else tiny_pictures(folder, family)
    found = pictures_of(made)
    assert found is not None
    return models.load(found, CPU, torch.float32, tiling=False)


class Run:
    def __init__(self, pipe: Any, **settings: Any) -> None:
        self.told: list[FromEngine] = []
        self.painter: Any = models.choose(pipe, CPU, torch.float32, {"size": (32, 32), "frames": 5})[0]
        self.studio = Studio(self.painter, Settings(budget=1 << 20, **settings), self.told.append)
        self.latents: dict[str, torch.Tensor] = {}

    def submit(self, key: str, **fields: Any) -> None:
        one = {"prompt": "draw a red cat", "seed": 7, "steps": STEPS, **fields}
        self.studio.submit(Draw(id=key, film=self.painter.facts.films, **one))

    def steps(self, count: int = 1 << 20) -> None:
        while count and self.studio.step():
            count -= 1
            self.latents |= {job.id: job.latents for job in self.studio.jobs.values() if job.latents is not None}
        assert not any(isinstance(one, Painted) and one.error for one in self.told), self.told[-1]

    @property
    def saved(self) -> int:
        return sum(cache.saved for cache in self.painter.step_caches)


# The pipeline of Stable Diffusion 3 has no places for diffusers' cache.
@pytest.mark.parametrize("family", ["flux", "qwen_image", "wan_two"])
def test_decisions_and_latents_are_those_of_diffusers(tmp_path: Path, family: str) -> None:
    from diffusers.hooks import FirstBlockCacheConfig, apply_first_block_cache

    guided = {"true_cfg": 3.0, "negative": "a dog"} if family in ("flux", "qwen_image") else {"guidance": 3.0}
    if family == "flux":
        guided = {"guidance": 3.0}
    run = Run(load(tmp_path / "ours", family))
    run.submit("off", **guided)
    run.steps()
    assert not run.painter.step_caches
    run.submit("a", step_cache=FAMILIES[family], **guided)
    run.steps()
    pipe = load(tmp_path / "theirs", family)
    count, blocks = 0, list[Any]()
    for part in (pipe.transformer, pipe.components.get("transformer_2")):
        if part is not None:
            blocks += [block for name in run.painter.block_lists for block in part.get_submodule(name)][1:2]

    def counted(*_: Any) -> None:
        nonlocal count
        count += 1

    for block in blocks:  # before the hooks stand in front of it
        block.forward = _before(block.forward, counted)
    for part in (pipe.transformer, pipe.components.get("transformer_2")):
        if part is not None:
            apply_first_block_cache(part, FirstBlockCacheConfig(threshold=FAMILIES[family]))
    names = {"guidance": "guidance_scale", "true_cfg": "true_cfg_scale", "negative": "negative_prompt"}
    given = {names[name]: value for name, value in guided.items()} | ({"num_frames": 5} if "wan" in family else {})
    with torch.no_grad():
        made = pipe(
            prompt="draw a red cat", width=32, height=32, num_inference_steps=STEPS, output_type="latent",
            generator=torch.Generator().manual_seed(7), **given,
        )  # fmt: skip
    theirs = (made.frames if "wan" in family else made.images)[0]
    assert float((run.latents["a"] - theirs).abs().max()) < 2e-5
    asked = STEPS * (1 if family == "flux" else 2)
    others = {len(cache.blocks) - 1 for cache in run.painter.step_caches}.pop()
    assert run.saved == (asked - count) * others and 0 < run.saved < asked * others
    assert float((run.latents["a"] - run.latents["off"]).abs().max()) > 1e-4


def _before(forward: Any, told: Any) -> Any:
    import functools

    @functools.wraps(forward)
    def run(*args: Any, **options: Any) -> Any:
        told()
        return forward(*args, **options)

    return run


@pytest.mark.parametrize("family", list(FAMILIES))
def test_rows_that_compute_and_rows_that_do_not_share_passes_and_are_what_they_are_alone(
    tmp_path: Path, family: str
) -> None:
    pipe, usual = load(tmp_path, family), FAMILIES[family]
    jobs: list[dict[str, Any]] = [
        {"step_cache": usual, "prompt": "a cat"},
        {"step_cache": 1.2 * usual, "seed": 3, "steps": 8, "prompt": "a large red house on the river"},
        {"step_cache": None, "seed": 4},
        {"step_cache": 0.9 * usual, "seed": 5, "negative": "a dog", **({"true_cfg": 3.0} if family == "flux" else {})},
    ]
    alone, together = Run(pipe), Run(pipe)
    for at, fields in enumerate(jobs):
        alone.submit(str(at), **fields)
        alone.steps()
    together.painter.step_caches = alone.painter.step_caches  # they stand between the blocks already
    saved, mixed = alone.saved, 0
    for cache in alone.painter.step_caches:
        of_rows = cache._of_rows

        def counted(forward: Any, given: Any, cache: Any = cache, of_rows: Any = of_rows) -> Any:
            nonlocal mixed
            mixed += 0 < len(cache._computes) < len(cache._kept)
            return of_rows(forward, given)

        cache._of_rows = counted
    for at, fields in enumerate(jobs):
        together.submit(str(at), **fields)
        together.steps(2)
    together.steps()
    assert mixed and alone.saved == 2 * saved
    for at in range(len(jobs)):
        assert float((together.latents[str(at)] - alone.latents[str(at)]).abs().max()) < 5e-5


def test_a_pass_that_fails_leaves_what_is_kept(tmp_path: Path) -> None:
    run, calm = Run(load(tmp_path / "a", "flux")), Run(load(tmp_path / "b", "flux"))
    for one in (run, calm):
        one.submit("a", step_cache=FAMILIES["flux"])
        one.submit("b", step_cache=FAMILIES["flux"], seed=8)
        one.steps(5)
    transformer, broken = run.painter.transformer, run.painter.transformer.norm_out.forward

    def fails(*args: Any) -> Any:
        transformer.norm_out.forward = broken
        raise RuntimeError("once")

    transformer.norm_out.forward = fails
    for one in (run, calm):
        one.steps()
    for key in "ab":
        assert float((run.latents[key] - calm.latents[key]).abs().max()) < 2e-5
    assert run.saved == calm.saved > 0


def test_where_there_is_none_a_request_is_refused_and_0_asks_for_nothing(tmp_path: Path) -> None:
    run = Run(load(tmp_path, "z_image"))
    run.submit("a", step_cache=0.1)
    last = run.told[-1]
    assert isinstance(last, Painted) and (last.status, last.param) == (400, "cache")
    run.told.clear()
    run.submit("b", step_cache=0.0, steps=1)
    run.steps()
    assert not run.painter.step_caches
