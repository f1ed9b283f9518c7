"""Rows of negative prompts on a second device: the same pictures, whichever way they are guided, cached or adapted."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("diffusers", reason="pictures need diffusers: pip install 'phloem[diffusion]'")
pytest.importorskip("transformers")

import torch

from phloem.checkpoint.pictures import pictures_of
from phloem.core.caching import StepCaching
from phloem.core.messages import Draw, FromEngine, Painted
from phloem.diffusion import models
from phloem.diffusion.cfg_parallel import Beside
from phloem.diffusion.engine import Settings, Studio
from phloem.testing.films import KINDS as FILMS
from phloem.testing.films import tiny_films
from phloem.testing.pictures import tiny_pictures

pytestmark = pytest.mark.slow
CPU = torch.device("cpu")
OTHER = torch.device("cpu:0")  # not equal to the first: weights are copied and tensors moved
GUIDED: dict[str, dict[str, Any]] = {
    "flux": {"true_cfg": 3.0, "negative": "a dog"},
    "qwen_image": {"true_cfg": 3.0, "negative": "a large dog on the river"},
    "stable_diffusion_3": {"guidance": 3.0},
    "z_image": {"guidance": 3.0},
    "wan_two": {"guidance": 3.0},
    "ltx": {"guidance": 3.0, "negative": "a dog"},
}
PLAIN: dict[str, dict[str, Any]] = {
    "qwen_image": {"true_cfg": 1.0},
    "z_image": {"guidance": 0.0},
    "stable_diffusion_3": {"guidance": 1.0},
    "wan_two": {"guidance": 1.0},
    "ltx": {"guidance": 1.0},
}


class Run:
    def __init__(self, folder: Path, beside: torch.device | None = None) -> None:
        found = pictures_of(folder)
        assert found is not None
        self.told: list[FromEngine] = []
        pipe = models.load(found, CPU, torch.float32, tiling=False)
        self.painter: Any = models.choose(pipe, CPU, torch.float32, {"size": (32, 32), "frames": 9})[0]
        self.studio = Studio(self.painter, Settings(budget=1 << 20), self.told.append)
        self.latents: dict[str, torch.Tensor] = {}
        if beside is not None:
            self.studio.beside = Beside(self.painter, beside)

    def submit(self, key: str, **fields: Any) -> None:
        one = {"prompt": "draw a red cat", "seed": 7, "steps": 6, **fields}
        self.studio.submit(Draw(id=key, film=self.painter.facts.films, **one))

    def steps(self) -> None:
        while self.studio.step():
            self.latents |= {job.id: job.latents for job in self.studio.jobs.values() if job.latents is not None}

    def error(self, key: str) -> str:
        (found,) = [one for one in self.told if isinstance(one, Painted) and one.id == key and one.done]
        return found.error


def made(folder: Path, family: str) -> Path:
    return tiny_films(folder, family) if family in FILMS else tiny_pictures(folder, family)


@pytest.mark.some(4)
@pytest.mark.parametrize("device", [CPU, OTHER], ids=["shared weights", "copied weights"])
@pytest.mark.parametrize("family", list(GUIDED))
def test_latents_are_those_of_rows_in_one_pass(tmp_path: Path, family: str, device: torch.device) -> None:
    """Two guided pictures at different steps and one that is not: the second rows are computed by another thread."""
    folder = made(tmp_path, family)
    one, two = Run(folder), Run(folder, device)
    assert two.studio.beside is not None
    twin, passes = two.studio.beside.twin, dict[str, list[int]]()
    for name, painter in (("here", two.painter), ("there", twin)):
        forward = painter.forward

        def counted(rows: Any, name: str = name, forward: Any = forward) -> Any:
            passes.setdefault(f"{name} {threading.current_thread().name[:8]}", []).append(len(rows))
            return forward(rows)

        painter.forward = counted
    shared = twin.transformer.state_dict(keep_vars=True)
    same = [value is shared[name] for name, value in two.painter.transformer.state_dict(keep_vars=True).items()]
    assert all(same) if device == CPU else not any(same)
    for run in (one, two):
        run.submit("a", **GUIDED[family])
        run.studio.step()
        run.studio.step()
        run.submit("b", **{**GUIDED[family], "seed": 8, "prompt": "a house", "steps": 4})
        run.submit("c", **PLAIN.get(family, {}))
        run.steps()
    for key in "abc":
        assert not two.error(key)
        assert float((one.latents[key] - two.latents[key]).abs().max()) < 1e-5
    assert max(passes["here MainThre"]) == 3 and max(passes["there negative"]) == 2 and len(passes) == 2


@pytest.mark.parametrize("family", ["qwen_image", "wan_two"])
def test_step_caches_are_each_sides_own(tmp_path: Path, family: str) -> None:
    folder, rule = made(tmp_path, family), StepCaching(threshold=1.0)
    one, two = Run(folder), Run(folder, CPU)
    for run in (one, two):
        run.submit("a", step_cache=rule, **GUIDED[family])
        run.steps()
    assert two.studio.beside is not None and not two.error("a")
    assert float((one.latents["a"] - two.latents["a"]).abs().max()) < 1e-5
    sides = [*two.painter.step_caches, *two.studio.beside.twin.step_caches]
    assert sum(side.idle for side in sides) == sum(cache.idle for cache in one.painter.step_caches) > 0


@pytest.mark.parametrize("side", ["here", "there"])
def test_a_picture_fails_alone_whichever_side_fails_and_the_next_is_drawn(tmp_path: Path, side: str) -> None:
    run = Run(made(tmp_path, "stable_diffusion_3"), CPU)
    assert run.studio.beside is not None
    model = (run.painter if side == "here" else run.studio.beside.twin).transformer
    forward = model.norm_out.forward

    def fails(*_: Any) -> Any:
        raise RuntimeError("it breaks")

    model.norm_out.forward = fails
    run.submit("a", guidance=3.0)
    run.steps()
    assert "it breaks" in run.error("a")
    model.norm_out.forward = forward
    run.submit("b", guidance=3.0)
    run.steps()
    assert not run.error("b") and not run.studio.jobs
