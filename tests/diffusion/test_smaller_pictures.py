"""Models that draw in less memory: weights in 8 bits, parts that leave the device while they are not used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("diffusers", reason="pictures need diffusers: pip install 'phloem[diffusion]'")
pytest.importorskip("transformers")

import torch

from phloem.checkpoint.pictures import pictures_of
from phloem.core.errors import ConfigError
from phloem.core.messages import Draw, FromEngine, Painted, Wear
from phloem.diffusion import models, probe
from phloem.diffusion.engine import Settings, Studio
from phloem.diffusion.lora import Layer, Lora
from phloem.diffusion.parts import Parts
from phloem.diffusion.quantised import QuantisedLinear, quantise
from phloem.diffusion.worn import Wardrobe
from phloem.testing.pictures import tiny_pictures

pytestmark = pytest.mark.slow
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pictures(tmp_path_factory.mktemp("flux"), "flux")


def loaded(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    found = pictures_of(folder)
    assert found is not None
    return models.load(found, CPU, dtype, tiling=False)


def drawn(painter: Any, wardrobe: Wardrobe | None = None, **fields: Any) -> torch.Tensor:
    """The last latents of a picture."""
    told: list[FromEngine] = []
    studio = Studio(painter, Settings(budget=1), told.append)
    studio.wardrobe = wardrobe
    studio.submit(Draw(id="a", prompt="draw a red cat", seed=7, steps=3, width=16, height=16, **fields))
    latents = torch.zeros(())
    while studio.step():
        latents = next((job.latents for job in studio.jobs.values() if job.latents is not None), latents)
    assert isinstance(told[-1], Painted) and told[-1].done and not told[-1].error, told[-1]
    return latents


@pytest.mark.parametrize(("kind", "off"), [("int8", 0.01), ("fp8", 0.05)])
def test_a_quantised_layer_is_half_of_its_16_bits_and_near_them(kind: str, off: float) -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(256, 64, dtype=torch.bfloat16)
    made = QuantisedLinear(linear, kind)
    held = made.codes.nbytes + made.scales.nbytes
    assert held <= 0.54 * linear.weight.nbytes
    assert made.weight.dtype == torch.bfloat16 and not list(made.named_parameters(recurse=False))[1:]
    change = (made.weight.float() - linear.weight.float()).norm() / linear.weight.float().norm()
    assert 0 < float(change) < off
    zero = torch.nn.Linear(48, 4)  # no group of 32, and a row of zeros
    torch.nn.init.zeros_(zero.weight)
    assert not QuantisedLinear(zero, kind).weight.any()


def test_pictures_of_quantised_weights_are_near_and_take_adapters(folder: Path) -> None:
    plain = drawn(models.choose(loaded(folder), CPU, torch.float32, {})[0])
    name = "transformer_blocks.0.attn.to_q"
    torch.manual_seed(0)
    adapter = Lora("a", "", {name: Layer(torch.randn(2, 32), torch.randn(32, 2), 1.0)})
    for kind, off in (("int8", 0.02), ("fp8", 0.1)):
        pipe = loaded(folder)
        assert "instead of" in quantise(pipe, kind)
        assert isinstance(pipe.transformer.get_submodule(name), QuantisedLinear)
        assert type(pipe.transformer.x_embedder) is torch.nn.Linear  # outside the blocks
        painter = models.choose(pipe, CPU, torch.float32, {})[0]
        assert isinstance(painter, models.Family)
        made = drawn(painter)
        assert 0 < float((made - plain).norm() / plain.norm()) < off
        wardrobe = Wardrobe(pipe, painter.wearing)
        painter.wearing.prepare(adapter)
        wardrobe._held["a"] = adapter
        assert float((drawn(painter, wardrobe, lora=[Wear("a")]) - made).norm() / made.norm()) > 0.01
        assert torch.equal(drawn(painter, wardrobe), made)
    with pytest.raises(ConfigError, match="int8 and fp8"):
        quantise(loaded(folder), "int4")


def test_parts_are_on_the_device_while_they_are_used_alone(folder: Path) -> None:
    """The device is a count of what was brought to it and has not left: the processor has no other here."""
    plain = drawn(models.choose(loaded(folder), CPU, torch.float32, {})[0])
    pipe = loaded(folder)
    painter = models.choose(pipe, CPU, torch.float32, {"size": (16, 16)}, offload=True)[0]
    assert isinstance(painter, models.Family)
    seen: list[tuple[str, str | None]] = []
    modules = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    for name, part in modules.items():
        part.register_forward_pre_hook(lambda *_, name=name: seen.append((name, painter.parts.here)))
    decode = pipe.vae.decode
    pipe.vae.decode = lambda *args, **options: (seen.append(("vae", painter.parts.here)), decode(*args, **options))[1]
    assert torch.equal(drawn(painter, previews=1), plain)
    groups = {"text_encoder": "text encoders", "text_encoder_2": "text encoders", "transformer": "transformer"}
    assert {name for name, _ in seen} == {*groups, "vae"}
    assert all(here == groups.get(name, "VAE") for name, here in seen)
    assert painter.parts.moves == 5  # texts, steps, the preview, steps, the picture
    assert probe.budget(painter, lambda: None)[0] > 0


class Moved(torch.nn.Module):
    """Remembers where it was sent."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []

    def to(self, device: torch.device) -> Moved:  # type: ignore[override]
        self.places.append(device.type)
        return self


def test_what_leaves_goes_before_what_comes_and_two_transformers_are_never_here_together() -> None:
    names = ("text_encoder", "transformer", "transformer_2", "vae", "image_encoder")
    made = {name: Moved() for name in names}
    parts = Parts({**made, "tokenizer": None}, torch.device("meta"), offload=True)
    for group in ("text encoders", "transformer", "transformer", "transformer_2", "transformer", "VAE"):
        parts.use(group)
    places = {name: part.places for name, part in made.items()}
    assert places["text_encoder"] == ["meta", "cpu"]
    assert places["transformer"] == ["meta", "cpu", "meta", "cpu"] and places["transformer_2"] == ["meta", "cpu"]
    assert places["vae"] == places["image_encoder"] == ["meta"]
    stays = Parts(made, torch.device("meta"), offload=False)
    stays.use("transformer")
    assert stays.moves == 0 and made["transformer"].places == places["transformer"]
