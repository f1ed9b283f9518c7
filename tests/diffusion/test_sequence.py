"""One picture over several ranks: what one rank draws, whatever the family, by threads, shared memory and gloo."""

from __future__ import annotations

import multiprocessing
import threading
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("diffusers", reason="pictures need diffusers: pip install 'phloem[diffusion]'")
pytest.importorskip("transformers")

import torch
from sequence_ranks import latents_of, painter_of, rank_of

from phloem.core.caching import StepCaching
from phloem.core.errors import BadRequest, PhloemError
from phloem.core.messages import Draw, Painted, Pixels, Wear
from phloem.diffusion import probe
from phloem.diffusion.engine import Settings, Studio
from phloem.diffusion.sequence import SequenceParallel, parts_of
from phloem.diffusion.worn import Wardrobe
from phloem.testing.films import KINDS as FILMS
from phloem.testing.films import tiny_films
from phloem.testing.flux2 import flux_2
from phloem.testing.pictures import tiny_pictures

pytestmark = pytest.mark.slow
CPU = torch.device("cpu")
OTHER = torch.device("cpu:0")  # not equal to the first: weights are copied and tensors moved
SHADES = Pixels(80, 72, bytes(range(240)) * 72)
# What is asked of each family: guided by a second row with a text of another length, where it has one.
ASKED: dict[str, dict[str, Any]] = {
    "flux": {"guidance": 3.0, "true_cfg": 2.0, "negative": "a dog"},
    "qwen_image": {"true_cfg": 3.0, "negative": "a large dog on the river"},
    "stable_diffusion_3": {"guidance": 3.0},
    "z_image": {"guidance": 3.0},
    "wan_two": {"guidance": 3.0},
    "wan_first_frame": {"guidance": 3.0, "pictures": [SHADES]},
    "wan_image_to_video": {"guidance": 3.0, "pictures": [SHADES]},
    "ltx": {"guidance": 3.0, "negative": "a dog"},
    "ltx_image_to_video": {"guidance": 3.0, "pictures": [SHADES]},
    "hunyuan_video": {"guidance": 3.0, "true_cfg": 2.0, "negative": "a small dog on a river"},
}


def made(folder: Path, family: str) -> Path:
    return tiny_films(folder, family) if family in FILMS else tiny_pictures(folder, family)


def draws_of(family: str) -> list[Draw]:
    """Two that share steps but for the first; 64x96 pixels or less: numbers of tokens that 3 does not divide too."""
    film = family in FILMS
    size = {"width": 64, "height": 32} if family.startswith("ltx") else {"width": 32, "height": 48}
    return [
        Draw(id=key, prompt=prompt, seed=7, steps=steps, film=film, **size, **ASKED[family])
        for key, prompt, steps in (("a", "draw a red cat", 3), ("b", "a house on the river", 4))
    ]


def far(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert set(one) == set(other) == {"a", "b"}
    return max(float((one[key] - other[key]).abs().max()) for key in one)


@pytest.mark.some(7)
@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("family", list(ASKED))
def test_what_ranks_draw_is_what_one_draws(tmp_path: Path, family: str, ranks: int) -> None:
    folder = made(tmp_path, family)
    expected = latents_of(painter_of(folder), draws_of(family))
    painter = painter_of(folder)
    if painter.heads < ranks:
        with pytest.raises(PhloemError, match=f"{painter.heads} heads .* {ranks} ranks"):
            SequenceParallel(painter, [CPU] * (ranks - 1))
        return
    company = SequenceParallel(painter, [OTHER, CPU][: ranks - 1])
    seen = set[str]()
    for share in company.shares:
        attend = share._attend

        def noted(*args: Any, attend: Any = attend, **options: Any) -> Any:
            seen.add(threading.current_thread().name)
            return attend(*args, **options)

        share._attend = noted  # type: ignore[method-assign]
    assert far(latents_of(painter, draws_of(family), company), expected) < 1e-5
    assert len(seen) == ranks
    company.close()


@pytest.mark.parametrize("kind", ["Flux2Pipeline", "Flux2KleinPipeline"])
def test_what_ranks_draw_with_flux_2_is_what_one_draws(kind: str) -> None:
    """Its last blocks have texts and tokens in one."""
    from phloem.diffusion import models

    found: list[dict[str, torch.Tensor]] = []
    for ranks in (1, 2):
        painter = models.choose(flux_2(kind), CPU, torch.float32, {"size": (16, 16)})[0]
        assert isinstance(painter, models.Family)
        company = SequenceParallel(painter, [CPU]) if ranks > 1 else None
        draws = [
            Draw(id=key, prompt=prompt, seed=7, steps=3, width=24, height=20, guidance=3.0, pictures=[SHADES])
            for key, prompt in (("a", "draw a red cat"), ("b", "a house"))
        ]
        found.append(latents_of(painter, draws, company))
    assert far(*found) < 1e-5


@pytest.mark.some(3)
@pytest.mark.parametrize("name", ["shm", "gloo"])
@pytest.mark.parametrize("family", ["qwen_image", "wan_two", "hunyuan_video"])
def test_ranks_may_be_processes(tmp_path: Path, family: str, name: str) -> None:
    folder, place = made(tmp_path / "model", family), tmp_path / "ranks" / "place"
    place.parent.mkdir()
    draws = draws_of(family)
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=rank_of, args=(folder, place, name, rank, 2, draws)) for rank in range(2)]
    for one in ranks:
        one.start()
    expected = latents_of(painter_of(folder), draws)
    for one in ranks:
        one.join(600)
    assert [one.exitcode for one in ranks] == [0, 0]
    for rank in range(2):
        assert far(torch.load(place.with_name(f"{rank}.pt")), expected) < 1e-5


def test_adapters_are_worn_on_every_rank(tmp_path: Path) -> None:
    from lora_files import tensors, written

    folder, found = made(tmp_path / "model", "flux"), list[dict[str, torch.Tensor]]()
    for ranks in (1, 2):
        painter = painter_of(folder)
        company = SequenceParallel(painter, [OTHER]) if ranks > 1 else None
        names = ["transformer_blocks.0.attn.to_q", "single_transformer_blocks.0.proj_mlp", "x_embedder"]
        file = written(tmp_path / "a.safetensors", tensors(painter.pipe, names, 1))
        wardrobe = Wardrobe(painter.pipe, painter.wearing)
        wardrobe.load("ink", str(file))
        told: list[Any] = []
        studio, latents = Studio(painter, Settings(budget=1 << 20), told.append), dict[str, torch.Tensor]()
        studio.beside, studio.wardrobe = company, wardrobe
        for key, lora in (("a", [Wear("ink")]), ("b", None)):
            studio.submit(Draw(id=key, prompt="a cat", seed=3, steps=3, width=32, height=48, lora=lora))
        while studio.step():
            latents |= {job.id: job.latents for job in studio.jobs.values() if job.latents is not None}
        found.append(latents)
    assert far(*found) < 1e-5
    assert float((found[0]["a"] - found[0]["b"]).abs().max()) > 0.01


@pytest.mark.parametrize("rank", [0, 1])
def test_a_picture_fails_alone_whichever_rank_fails_and_the_next_is_drawn(tmp_path: Path, rank: int) -> None:
    painter = painter_of(made(tmp_path, "stable_diffusion_3"))
    company = SequenceParallel(painter, [CPU])
    model = (painter if rank == 0 else company.twins[0].painter).transformer
    attention = model.transformer_blocks[1].attn
    forward, told = attention.forward, list[Any]()

    def fails(*_: Any, **__: Any) -> Any:
        raise RuntimeError("it breaks")

    studio = Studio(painter, Settings(budget=1 << 20), told.append)
    studio.beside = company
    for key, broken in (("a", True), ("b", False)):
        attention.forward = fails if broken else forward
        studio.submit(Draw(id=key, prompt="a cat", seed=3, steps=2, width=32, height=32))
        while studio.step():
            pass
    ends = {one.id: one for one in told if isinstance(one, Painted) and one.done}
    assert "it breaks" in ends["a"].error and not ends["b"].error


def test_what_ranks_cannot_share_out_is_refused(tmp_path: Path) -> None:
    painter = painter_of(made(tmp_path, "qwen_image"))
    company = SequenceParallel(painter, [CPU])
    told: list[Any] = []
    studio = Studio(painter, Settings(budget=1 << 20), told.append)
    studio.beside = company
    studio.submit(Draw(id="c", prompt="a", seed=1, steps=2, step_cache=StepCaching(threshold=0.1)))
    studio.submit(Draw(id="d", prompt="a", seed=1, steps=2, width=4, height=4))  # one token
    while studio.step():
        pass
    ends = {one.id: one for one in told if isinstance(one, Painted) and one.done}
    assert (ends["c"].status, ends["c"].param) == (400, "cache") and BadRequest.status == 400
    assert "1 tokens cannot be shared out among 2 ranks" in ends["d"].error
    company.close()


def test_the_probe_runs_on_all_ranks(tmp_path: Path) -> None:
    painter = painter_of(made(tmp_path, "wan"))
    company = SequenceParallel(painter, [CPU])
    tokens, why = probe.budget(painter, lambda: None, company)
    assert tokens > 0 and "fill a step" in why
    company.close()


def test_parts_are_all_of_it_and_as_large_as_each_other() -> None:
    for count in (4, 5, 7, 12):
        for size in (1, 2, 3, 4):
            found = parts_of(count, size)
            assert [low for low, _ in found] == [0, *(high for _, high in found[:-1])] and found[-1][1] == count
            assert max(high - low for low, high in found) - min(high - low for low, high in found) <= 1
