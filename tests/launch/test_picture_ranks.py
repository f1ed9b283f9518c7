"""Ranks of a model that draws as processes: what one draws, by shared memory and gloo; a rank that fails, or ends."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("diffusers", reason="pictures need diffusers: pip install 'phloem[diffusion]'")
pytest.importorskip("transformers")

import torch
from sequence_ranks import latents_of, painter_of

from phloem.core.config import Config
from phloem.core.errors import PhloemError
from phloem.core.messages import Draw, Painted, Wear
from phloem.diffusion import probe, wire
from phloem.diffusion.engine import Settings, Studio
from phloem.diffusion.family import Row, rows_of
from phloem.diffusion.lora import Layer, Lora
from phloem.diffusion.request import Condition, Seen
from phloem.diffusion.worn import Wardrobe
from phloem.launch.picture_ranks import PictureRanks
from phloem.testing.films import KINDS as FILMS
from phloem.testing.films import tiny_films
from phloem.testing.pictures import tiny_pictures

CPU = torch.device("cpu")
ASKED: dict[str, dict[str, Any]] = {
    "flux": {"guidance": 3.0, "true_cfg": 2.0, "negative": "a dog"},
    "z_image": {"guidance": 3.0},
    "qwen_image": {"true_cfg": 3.0, "negative": "a large dog on the river"},
    "wan_two": {"guidance": 3.0},
    "hunyuan_video": {"guidance": 3.0, "true_cfg": 2.0, "negative": "a small dog on a river"},
}


def made(folder: Path, family: str) -> Path:
    return tiny_films(folder, family) if family in FILMS else tiny_pictures(folder, family)


def draws_of(family: str) -> list[Draw]:
    film = family in FILMS
    return [
        Draw(id=key, prompt=prompt, seed=7, steps=steps, film=film, width=32, height=48, **ASKED.get(family, {}))
        for key, prompt, steps in (("a", "draw a red cat", 3), ("b", "a house on the river", 4))
    ]


@contextmanager
def ranks_of(folder: Path, painter: Any, name: str = "shm", size: int = 2) -> Generator[PictureRanks]:
    defaults = '{"size": "64x32", "frames": 5}' if painter.facts.films else '{"size": "64x32"}'
    config = Config.from_flat({
        "model_path": str(folder), "tp_size": size, "tp_comm": name, "device": "cpu", "dtype": "float32", "threads": 1,
        "image_defaults": defaults,
    })  # fmt: skip
    company = PictureRanks(config, painter)
    try:
        yield company
    finally:
        company.close()


def far(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert set(one) == set(other) == {"a", "b"}
    return max(float((one[key] - other[key]).abs().max()) for key in one)


@pytest.mark.some(2)
@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "name"), [(family, "shm") for family in ASKED] + [("qwen_image", "gloo"), ("wan_two", "gloo")]
)
def test_what_processes_draw_is_what_one_draws(tmp_path: Path, family: str, name: str) -> None:
    folder = made(tmp_path, family)
    expected = latents_of(painter_of(folder), draws_of(family))
    painter = painter_of(folder)
    with ranks_of(folder, painter, name) as company:
        assert len(company.processes) == 1
        assert far(latents_of(painter, draws_of(family), company), expected) < 1e-5
        tokens, why = probe.budget(painter, lambda: None, company)
        assert tokens > 0 and "fill a step" in why
        (pid,) = company.processes
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.mark.slow
def test_a_picture_whose_rank_is_killed_fails_with_the_reason_and_the_next_is_drawn(tmp_path: Path) -> None:
    folder = made(tmp_path, "stable_diffusion_3")
    draws = draws_of("stable_diffusion_3")
    expected = latents_of(painter_of(folder), draws)
    painter, told = painter_of(folder), list[Any]()
    with ranks_of(folder, painter) as company:
        studio = Studio(painter, Settings(budget=1 << 20), told.append)
        studio.beside, (pid,) = company, company.processes
        studio.submit(draws[0])
        while studio.steps < 1:
            studio.step()
        os.kill(pid, signal.SIGKILL)
        while studio.step():
            pass
        (end,) = (one for one in told if isinstance(one, Painted) and one.done)
        assert "rank 1 of 2 has gone" in end.error and "SIGKILL" in end.error, end
        assert not studio.jobs and not company.processes
        assert far(latents_of(painter, draws, company), expected) < 1e-5
        assert company.processes not in ([], [pid])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["shm", "gloo"])
def test_what_one_rank_fails_of_is_told_and_all_go_on(tmp_path: Path, name: str) -> None:
    folder = made(tmp_path, "flux")
    painter, alone = painter_of(folder), painter_of(folder)
    with torch.inference_mode(), ranks_of(folder, painter, name) as company:
        (row,) = rows_of(probe._job(painter, 1))
        (expected,) = alone.forward([row])
        pids = company.processes
        nowhere = Lora("x", "x", {"no.such.layer": Layer(torch.ones(1, 2), torch.ones(2, 1), 1.0)})
        with pytest.raises(RuntimeError, match=r"rank 1 of 2: AttributeError.*no"):
            company.forward([replace(row, worn=((nowhere, 1.0),))], [False])
        assert float((company.forward([row], [False])[0] - expected).abs().max()) < 1e-5
        with pytest.raises(RuntimeError):  # the first one fails by itself
            company.forward([replace(row, latents=row.latents[:, :-1])], [False])
        assert float((company.forward([row], [False])[0] - expected).abs().max()) < 1e-5
        assert company.processes == pids


@pytest.mark.slow
def test_adapters_are_worn_in_processes_too(tmp_path: Path) -> None:
    from lora_files import tensors, written

    folder, found = made(tmp_path / "model", "flux"), list[dict[str, torch.Tensor]]()
    names = ["transformer_blocks.0.attn.to_q", "single_transformer_blocks.0.proj_mlp", "x_embedder"]
    plain, shared = painter_of(folder), painter_of(folder)
    file = written(tmp_path / "a.safetensors", tensors(plain.pipe, names, 1))
    with ranks_of(folder, shared) as ranks:
        for painter, company in ((plain, None), (shared, ranks)):
            wardrobe = Wardrobe(painter.pipe, painter.wearing)
            wardrobe.load("ink", str(file))
            studio, latents = Studio(painter, Settings(budget=1 << 20), lambda told: None), dict[str, torch.Tensor]()
            studio.beside, studio.wardrobe = company, wardrobe
            for key, lora in (("a", [Wear("ink")]), ("b", None)):
                studio.submit(Draw(id=key, prompt="a cat", seed=3, steps=3, width=32, height=48, lora=lora))
            while studio.step():
                latents |= {job.id: job.latents for job in studio.jobs.values() if job.latents is not None}
            found.append(latents)
    assert far(*found) < 1e-5
    assert float((found[0]["a"] - found[0]["b"]).abs().max()) > 0.01


@pytest.mark.slow
def test_a_rank_that_cannot_load_is_told_before_anything_is_served(tmp_path: Path) -> None:
    folder = made(tmp_path, "flux")
    painter = painter_of(folder)
    for file in (folder / "transformer").glob("*.safetensors"):
        file.write_bytes(b"no weights")
    with pytest.raises(PhloemError, match=r"rank 1 of 2 has gone: .*transformer"), ranks_of(folder, painter):
        raise AssertionError("it came")


def row_of(condition: Condition, seen: Seen | None, worn: Any = ()) -> Row:
    return Row(torch.randn(3, 4), 900.0, condition, 3.5, 32, 16, seen, worn=worn, last=True, fps=24.0)


def same(one: Any, other: Any) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


def test_rows_are_read_as_they_were_sent_and_shared_things_once() -> None:
    text = Condition(torch.randn(5, 8).bfloat16(), torch.randn(8), 5)
    bare = Condition(torch.zeros(0, 8))
    seen = Seen(torch.randn(2, 4), ((1, 2), (3, 4)), torch.randn(2, 3))
    ink = Lora("ink", "ink.safetensors", {"to_q": Layer(torch.randn(2, 8), torch.randn(8, 2), 0.5, torch.randn(8))})
    rows = [row_of(text, seen, ((ink, 0.7),)), row_of(bare, None), row_of(text, None)]
    sender, prepared = wire.Sender(), list[Lora]()
    reader = wire.Reader(CPU, torch.float32, prepared.append)
    order = wire.decode(wire.encode(sender.order(1, rows)))
    assert isinstance(order, wire.Pass) and len(order.new) == 4 and order.number == 1
    found = reader.rows(order)
    for one, other in zip(found, rows, strict=True):
        assert same(one.latents, other.latents) and same(one.condition.states_SE, other.condition.states_SE)
        facts = [(row.time, row.embedded, row.width, row.height, row.last, row.fps) for row in (one, other)]
        assert facts[0] == facts[1] and one.condition.text_tokens == other.condition.text_tokens
    assert found[0].condition is found[2].condition and found[1].seen is None and found[1].condition.pooled_E is None
    assert found[0].condition.pooled_E is not None and text.pooled_E is not None
    assert same(found[0].condition.pooled_E, text.pooled_E)
    assert (
        found[0].seen is not None and found[0].seen.shapes == seen.shapes and same(found[0].seen.latents, seen.latents)
    )
    (worn, weight) = found[0].worn[0]
    assert weight == 0.7 and prepared == [worn] and same(worn.layers["to_q"].b_OR, ink.layers["to_q"].b_OR)

    again = wire.decode(wire.encode(sender.order(2, rows)))
    assert isinstance(again, wire.Pass) and not again.new and not again.gone
    assert reader.rows(again)[0].worn[0][0] is worn
    del rows, seen, found
    gc.collect()
    last = sender.order(3, [row_of(text, None)])
    assert len(last.gone) == 1 and not last.new  # the picture; the text and the adapter are still held
    assert reader.rows(last)[0].condition.text_tokens == 5
