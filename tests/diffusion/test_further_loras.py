"""Adapters of films and edits, against diffusers' pipelines with the same files loaded, on tiny random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("diffusers", reason="pictures need diffusers: pip install 'phloem[diffusion]'")
pytest.importorskip("peft", reason="what is compared with needs it")

import torch
from lora_files import tensors, written
from safetensors.torch import save_file

from phloem.checkpoint.pictures import pictures_of
from phloem.core.messages import Draw, FromEngine, Painted, Pixels, Wear
from phloem.diffusion import models
from phloem.diffusion.engine import Settings, Studio
from phloem.diffusion.family import image_of
from phloem.diffusion.worn import Wardrobe
from phloem.testing.films import KINDS as FILMS
from phloem.testing.films import tiny_films
from phloem.testing.flux2 import flux_2
from phloem.testing.pictures import qwen_image_edit, tiny_pictures

pytestmark = pytest.mark.slow
CPU = torch.device("cpu")
PICTURE = Pixels(64, 48, np.random.default_rng(0).integers(0, 256, 64 * 48 * 3, dtype=np.uint8).tobytes())
SMALL = 64 * 64  # pixels at which pictures are read here
MADE = {
    "flux_2": lambda: flux_2("Flux2Pipeline"),
    "flux_2_klein": lambda: flux_2("Flux2KleinPipeline"),
    "qwen_image_edit": lambda: qwen_image_edit("QwenImageEditPipeline"),
    "qwen_image_edit_plus": lambda: qwen_image_edit("QwenImageEditPlusPipeline"),
}
WAN = ["blocks.0.attn1.to_q", "blocks.1.attn2.to_v", "blocks.0.ffn.net.0.proj", "condition_embedder.time_proj"]
LTX = ["transformer_blocks.0.attn1.to_q", "transformer_blocks.1.attn2.to_out.0", "transformer_blocks.1.ff.net.2"]
FLUX_2 = [
    "transformer_blocks.0.attn.to_q",
    "transformer_blocks.0.ff.linear_in",
    "single_transformer_blocks.0.attn.to_qkv_mlp_proj",
    "x_embedder",
]
EDIT = ["transformer_blocks.0.attn.to_k", "transformer_blocks.1.attn.to_out.0", "transformer_blocks.1.img_mod.1"]
LAYERS = {
    "wan": WAN,
    "wan_two": WAN[:3],
    "wan_first_frame": WAN,
    "wan_image_to_video": WAN[:3],
    "ltx": [*LTX, "proj_in", "time_embed.linear"],
    "ltx_image_to_video": LTX,
    "hunyuan_video": [
        "transformer_blocks.0.attn.to_q",
        "transformer_blocks.1.ff_context.net.2",
        "single_transformer_blocks.0.proj_mlp",
        "context_embedder.proj_in",
    ],
    "flux_kontext": ["transformer_blocks.0.attn.to_q", "single_transformer_blocks.0.proj_mlp", "x_embedder"],
    "flux_2": FLUX_2,
    "flux_2_klein": FLUX_2,
    "qwen_image_edit": EDIT,
    "qwen_image_edit_plus": EDIT,
}
GUIDED: tuple[dict[str, Any], dict[str, Any]] = ({"guidance": 3.0}, {"guidance_scale": 3.0})
TRUE: tuple[dict[str, Any], dict[str, Any]] = (
    {"true_cfg": 3.0, "negative": "a dog"},
    {"true_cfg_scale": 3.0, "negative_prompt": "a dog"},
)
SHOWN = ("wan_image_to_video", "ltx_image_to_video", "flux_kontext", "qwen_image_edit", "qwen_image_edit_plus")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures are read at a megapixel: here by both sides at less. And what mends mojibake need not be here."""
    from diffusers.pipelines.flux import pipeline_flux_kontext as kontext
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit as edit
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as plus
    from diffusers.pipelines.wan import pipeline_wan, pipeline_wan_i2v

    from phloem.diffusion.models import qwen_image_edit as ours
    from phloem.diffusion.models import qwen_image_edit_plus as ours_plus

    monkeypatch.setattr(pipeline_wan_i2v, "prompt_clean", pipeline_wan.prompt_clean)
    monkeypatch.setattr(kontext, "PREFERRED_KONTEXT_RESOLUTIONS", [(48, 24), (32, 32), (24, 48)])
    theirs = edit.calculate_dimensions
    monkeypatch.setattr(edit, "calculate_dimensions", lambda area, ratio: theirs(SMALL, ratio))
    for module, name, area in (
        (plus, "CONDITION_IMAGE_SIZE", SMALL // 2),
        (plus, "VAE_IMAGE_SIZE", SMALL),
        (ours, "READ_AREA", SMALL),
        (ours_plus, "SEEN_AREA", SMALL // 2),
    ):
        monkeypatch.setattr(module, name, area)


def loaded(folder: Path, family: str) -> Any:
    """The same weights each time."""
    if family in MADE:
        return MADE[family]()
    if not folder.exists():
        (tiny_films if family in FILMS else tiny_pictures)(folder, family)
    found = pictures_of(folder)
    assert found is not None
    return models.load(found, CPU, torch.float32, tiling=False)


class Run:
    """A studio with a wardrobe, that keeps the last latents of each picture or film."""

    def __init__(self, pipe: Any, family: str) -> None:
        self.told: list[FromEngine] = []
        painter, why = models.choose(pipe, CPU, torch.float32, {"size": size_of(family), "frames": 5})
        assert isinstance(painter, models.Family), why
        self.painter = painter
        self.studio = Studio(painter, Settings(budget=1 << 20), self.told.append)
        self.wardrobe = self.studio.wardrobe = Wardrobe(pipe, painter.wearing)
        self.latents: dict[str, torch.Tensor] = {}

    def submit(self, key: str, lora: list[Wear] | None, **fields: Any) -> None:
        film = self.painter.facts.films
        self.studio.submit(Draw(id=key, prompt="draw a red cat", seed=7, steps=3, lora=lora, film=film, **fields))

    def steps(self) -> None:
        while self.studio.step():
            self.latents |= {job.id: job.latents for job in self.studio.jobs.values() if job.latents is not None}

    def error(self, key: str) -> str:
        return next(one for one in reversed(self.told) if isinstance(one, Painted) and one.id == key).error


def size_of(family: str) -> tuple[int, int]:
    return (64, 32) if family.startswith("ltx") else (32, 16)


def reference(pipe: Any, family: str, **fields: Any) -> torch.Tensor:
    width, height = size_of(family)
    if family in FILMS:
        fields["num_frames"] = 5
    if family in SHOWN:
        fields["image"] = image_of(PICTURE)
    if family == "flux_kontext":
        fields["max_area"] = width * height  # else the size is of a megapixel
    with torch.no_grad():
        made = pipe(
            prompt="draw a red cat", width=width, height=height, num_inference_steps=3,
            generator=torch.Generator().manual_seed(7), output_type="latent", **fields,
        )  # fmt: skip
    return (made.frames if family in FILMS else made.images)[0]


def of_ours(run: Run, family: str, latents: torch.Tensor) -> torch.Tensor:
    """FLUX.2 Klein's pipeline gives them as the VAE reads them."""
    return run.painter.latents_CHW(latents, *size_of(family)) if family == "flux_2_klein" else latents


@pytest.mark.some(4)
@pytest.mark.parametrize("family", list(LAYERS))
def test_what_is_made_is_what_the_pipeline_makes_with_the_adapters_loaded(tmp_path: Path, family: str) -> None:
    """Two adapters with a scale each, together and alone, beside rows that wear none."""
    ours, theirs = (loaded(tmp_path / "model", family) for _ in range(2))
    theirs.set_progress_bar_config(disable=True)
    run = Run(ours, family)
    fields, given = TRUE if family.startswith("qwen") else GUIDED
    if family == "hunyuan_video":
        fields, given = ({**one, **other} for one, other in zip(GUIDED, TRUE, strict=True))
    if family in SHOWN:
        fields = {**fields, "pictures": [PICTURE]}
    fields = {**fields, **dict(zip(("width", "height"), size_of(family), strict=True))}
    files = {
        "a": written(tmp_path / "a.safetensors", tensors(ours, LAYERS[family], 1), alpha=3.0),
        "b": written(tmp_path / "b.safetensors", tensors(ours, LAYERS[family][:1], 2)),
    }
    expected = {"none": reference(theirs, family, **given)}
    for name, file in files.items():
        run.wardrobe.load(name, str(file))
        theirs.load_lora_weights(str(file), adapter_name=name)
    worn = {"none": None, "a": [Wear("a")], "b": [Wear("b", 0.5)], "both": [Wear("a", 0.7), Wear("b", -1.5)]}
    for key in ("a", "b", "both"):
        theirs.set_adapters([one.name for one in worn[key] or []], [one.scale for one in worn[key] or []])
        expected[key] = reference(theirs, family, **given)
    for key, asked in worn.items():
        run.submit(key, asked, **fields)
    run.steps()
    for key in worn:
        assert not run.error(key)
        assert float((of_ours(run, family, run.latents[key]) - expected[key]).abs().max()) < 1e-5, key
    assert float((expected["a"] - expected["none"]).abs().max()) > 0.01


# Names that trainers of these models write, of one layer each, and the diffusers layer that it is.
NAMES = {
    "wan": ("diffusion_model.blocks.0.self_attn.q", "blocks.0.attn1.to_q"),
    "ltx": ("diffusion_model.transformer_blocks.0.attn1.to_q", "transformer_blocks.0.attn1.to_q"),
}


@pytest.mark.parametrize("family", list(NAMES))
def test_files_by_the_names_of_other_trainers_are_those_of_diffusers(tmp_path: Path, family: str) -> None:
    ours, theirs = (loaded(tmp_path / "model", family) for _ in range(2))
    theirs.set_progress_bar_config(disable=True)
    name, layer = NAMES[family]
    made = tensors(ours, [layer], 1)
    found = {key.replace(f"transformer.{layer}", name, 1): value for key, value in made.items()}
    assert set(found).isdisjoint(made)
    save_file(found, tmp_path / "a.safetensors", {"format": "pt"})
    run = Run(ours, family)
    run.wardrobe.load("a", str(tmp_path / "a.safetensors"))
    plain = reference(theirs, family, guidance_scale=3.0)
    theirs.load_lora_weights(str(tmp_path / "a.safetensors"), adapter_name="a")
    expected = reference(theirs, family, guidance_scale=3.0)
    run.submit("a", [Wear("a")], guidance=3.0)
    run.steps()
    assert float((run.latents["a"] - expected).abs().max()) < 1e-5
    assert float((plain - expected).abs().max()) > 0.01
