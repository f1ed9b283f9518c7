"""Adapters of models that draw, against diffusers' pipelines with the same files loaded, on tiny random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("diffusers", reason="pictures need diffusers: pip install 'phloem[diffusion]'")
pytest.importorskip("peft", reason="what is compared with needs it")

import torch
from lora_files import tensors, written
from safetensors.torch import save_file

from phloem.checkpoint.pictures import pictures_of
from phloem.core.caching import StepCaching
from phloem.core.errors import BadRequest, ConfigError
from phloem.core.messages import Draw, FromEngine, Painted, Wear
from phloem.diffusion import models
from phloem.diffusion.engine import Settings, Studio
from phloem.diffusion.worn import Wardrobe
from phloem.testing.pictures import tiny_pictures

pytestmark = pytest.mark.slow
CPU = torch.device("cpu")
# Layers of each family, of the attention and of what is beside it.
LAYERS = {
    "flux": [
        "transformer_blocks.0.attn.to_q",
        "transformer_blocks.0.ff.net.2",
        "single_transformer_blocks.0.proj_mlp",
        "x_embedder",
        "transformer_blocks.0.norm1.linear",
    ],
    "qwen_image": [
        "transformer_blocks.0.attn.to_k",
        "transformer_blocks.1.attn.to_out.0",
        "transformer_blocks.1.img_mod.1",
    ],
    "stable_diffusion_3": ["transformer_blocks.0.attn.to_v", "transformer_blocks.1.ff.net.2"],
    "z_image": ["layers.0.attention.to_q", "layers.0.feed_forward.w1", "cap_embedder.1"],
}
FIELDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "flux": ({"guidance": 3.0}, {"guidance_scale": 3.0}),
    "qwen_image": ({"true_cfg": 3.0, "negative": "a dog"}, {"true_cfg_scale": 3.0, "negative_prompt": "a dog"}),
    "stable_diffusion_3": ({"guidance": 4.0}, {"guidance_scale": 4.0}),
    "z_image": ({"guidance": 3.0}, {"guidance_scale": 3.0}),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[str, Path] = {}

    def of(family: str) -> Path:
        if family not in made:
            made[family] = tiny_pictures(tmp_path_factory.mktemp(family), family)
        return made[family]

    return of


def loaded(folder: Path) -> Any:
    found = pictures_of(folder)
    assert found is not None
    return models.load(found, CPU, torch.float32, tiling=False)


class Run:
    """A studio with a wardrobe, that keeps each picture's last latents."""

    def __init__(self, pipe: Any, **settings: Any) -> None:
        self.told: list[FromEngine] = []
        painter = models.choose(pipe, CPU, torch.float32, {"size": (16, 16)})[0]
        assert not isinstance(painter, models.Whole)
        self.painter = painter
        self.studio = Studio(painter, Settings(budget=1 << 20, **settings), self.told.append)
        self.wardrobe = self.studio.wardrobe = Wardrobe(pipe, painter.wearing)
        self.latents: dict[str, torch.Tensor] = {}

    def submit(self, key: str, lora: list[Wear] | None, seed: int = 7, steps: int = 3, **fields: Any) -> None:
        self.studio.submit(
            Draw(id=key, prompt="draw a red cat", seed=seed, width=16, height=16, steps=steps, lora=lora, **fields)
        )

    def steps(self, count: int = 1 << 20) -> None:
        while count and self.studio.step():
            count -= 1
            self.latents |= {job.id: job.latents for job in self.studio.jobs.values() if job.latents is not None}

    def last(self, key: str) -> Painted:
        return next(one for one in reversed(self.told) if isinstance(one, Painted) and one.id == key)


def reference(pipe: Any, **fields: Any) -> torch.Tensor:
    with torch.no_grad():
        return pipe(
            prompt="draw a red cat", width=16, height=16, num_inference_steps=3,
            generator=torch.Generator().manual_seed(7), output_type="latent", **fields,
        ).images[0]  # fmt: skip


@pytest.mark.parametrize("family", list(LAYERS))
def test_pictures_are_those_of_the_pipeline_with_the_adapters_loaded(folders: Any, tmp_path: Path, family: str) -> None:
    """Two adapters with a scale each, together and alone, in one step with a picture that wears none."""
    ours, theirs = loaded(folders(family)), loaded(folders(family))
    run = Run(ours)
    (fields, given), files = FIELDS[family], {}
    files["a"] = written(tmp_path / "a.safetensors", tensors(ours, LAYERS[family], 1), alpha=3.0)
    files["b"] = written(tmp_path / "b.safetensors", tensors(ours, LAYERS[family][:1], 2))
    expected = {"none": reference(theirs, **given)}
    for name, file in files.items():
        run.wardrobe.load(name, str(file))
        theirs.load_lora_weights(str(file), adapter_name=name)
    worn = {"none": None, "a": [Wear("a")], "b": [Wear("b", 0.5)], "both": [Wear("a", 0.7), Wear("b", -1.5)]}
    for key in ("a", "b", "both"):
        theirs.set_adapters([one.name for one in worn[key] or []], [one.scale for one in worn[key] or []])
        expected[key] = reference(theirs, **given)
    passes: list[int] = []
    forward = run.painter.forward
    run.painter.forward = lambda rows: (passes.append(len({row.worn for row in rows})), forward(rows))[1]  # type: ignore[method-assign]
    for key, asked in worn.items():
        run.submit(key, asked, **fields)
    run.steps()
    for key in worn:
        assert not run.last(key).error
        assert float((run.latents[key] - expected[key]).abs().max()) < 1e-5, key
    assert float((expected["a"] - expected["none"]).abs().max()) > 0.01
    assert max(passes) == (1 if family == "z_image" else 4)  # its rows are lists: adapters have steps of their own


def test_files_of_other_trainers_are_read_as_diffusers_reads_them(folders: Any, tmp_path: Path) -> None:
    """kohya's names, where one matrix is that of three layers, with alphas; and names without PEFT's, with none."""
    ours, theirs = loaded(folders("flux")), loaded(folders("flux"))
    generator = torch.Generator().manual_seed(3)
    width = ours.transformer.inner_dim
    found: dict[str, torch.Tensor] = {}
    for name, inputs, outputs in (
        ("double_blocks_0_img_attn_qkv", width, 3 * width),
        ("double_blocks_0_img_mlp_0", width, 4 * width),
        ("single_blocks_0_linear2", 5 * width, width),
    ):
        found[f"lora_unet_{name}.lora_down.weight"] = torch.randn(2, inputs, generator=generator) / inputs**0.5
        found[f"lora_unet_{name}.lora_up.weight"] = torch.randn(outputs, 2, generator=generator)
        found[f"lora_unet_{name}.alpha"] = torch.tensor(1.0)
    run = Run(ours)
    plain = reference(theirs, guidance_scale=3.0)
    for at, tensors_of in enumerate((found, {key: value for key, value in found.items() if "alpha" not in key})):
        file = written(tmp_path / f"{at}.safetensors", tensors_of)
        theirs.load_lora_weights(str(file), adapter_name=str(at))
        theirs.set_adapters([str(at)])
        run.wardrobe.load(str(at), str(tmp_path / f"{at}.safetensors"))
        run.submit(str(at), [Wear(str(at))], guidance=3.0)
        run.steps()
        expected = reference(theirs, guidance_scale=3.0)
        assert float((run.latents[str(at)] - expected).abs().max()) < 1e-5
        assert float((plain - expected).abs().max()) > 0.01


def test_step_caches_and_adapters_go_together(folders: Any, tmp_path: Path) -> None:
    """A cache leaves rows out behind the first block: what wears something else has steps of its own."""
    pipe = loaded(folders("qwen_image"))
    file = written(tmp_path / "a.safetensors", tensors(pipe, LAYERS["qwen_image"], 1))
    alone, together = Run(pipe), Run(loaded(folders("qwen_image")))
    for run in (alone, together):
        run.wardrobe.load("a", str(file))
    for at in range(4):
        asked = [Wear("a")] if at % 2 else []
        for run in (alone, together):
            run.submit(str(at), asked, seed=at, steps=6, step_cache=StepCaching(threshold=0.2))
            run.steps(1 << 20 if run is alone else 2)
    together.steps()
    for at in range(4):
        assert float((alone.latents[str(at)] - together.latents[str(at)]).abs().max()) < 2e-5


def test_adapters_that_do_not_fit_are_refused_by_field(folders: Any, tmp_path: Path) -> None:
    pipe = loaded(folders("flux"))
    run, name = Run(pipe), LAYERS["flux"][0]
    good = tensors(pipe, [name], 1)
    a, b = good.values()
    prefix = f"transformer.{name}"
    cases: list[tuple[dict[str, torch.Tensor], str]] = [
        ({f"{prefix}.lora_A.weight": a[:, 1:].clone(), f"{prefix}.lora_B.weight": b}, "takes 32"),
        ({f"{prefix}.lora_A.weight": a}, "two matrices|no matrices"),
        ({"transformer.blocks.77.to_q.lora_A.weight": a, "transformer.blocks.77.to_q.lora_B.weight": b}, "no layer"),
        (
            {**good, "text_encoder.x.lora_A.weight": a.clone(), "text_encoder.x.lora_B.weight": b.clone()},
            "text encoder",
        ),
        ({**good, f"{prefix}.dora_scale": b.clone()}, "DoRA"),
        ({f"{prefix}.lora_A.weight": a * float("nan"), f"{prefix}.lora_B.weight": b}, "finite"),
        ({f"{prefix}.lora_A.weight": a * 1e30, f"{prefix}.lora_B.weight": b}, "beyond 1e"),
        ({f"{prefix}.lora_A.weight": a[:0].clone(), f"{prefix}.lora_B.weight": b[:, :0].clone()}, "matrices of 0x"),
        ({"x": a}, "expected matrices"),
    ]
    for at, (found, says) in enumerate(cases):
        file = written(tmp_path / f"{at}.safetensors", found)
        with pytest.raises(BadRequest, match=says) as refused:
            run.wardrobe.load("bad", str(file))
        assert refused.value.param == "lora_path"
    (tmp_path / "no.safetensors").write_bytes(b"no")
    for path in (tmp_path / "no.safetensors", tmp_path / "none", tmp_path):
        with pytest.raises(BadRequest, match="lora_path"):
            run.wardrobe.load("bad", str(path))
    assert not run.wardrobe.loaded()
    run.submit("p", [Wear("bad")])
    assert (run.last("p").status, run.last("p").param) == (400, "lora")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ([1, 2], "list"),
        ({"transformer.r": "x", "transformer.lora_alpha": None}, "settings"),
        ({"transformer.lora_alpha": "x"}, "settings"),
        ({"transformer.lora_alpha": 10**400}, "settings"),
        ({"transformer.lora_alpha": float("inf")}, "finite"),
        ({"transformer.lora_alpha": 1, "transformer.alpha_pattern": 4}, "settings"),
        ({"transformer.lora_alpha": 1, "transformer.alpha_pattern": {"([": 4}}, "no pattern"),
        ({"transformer.lora_alpha": 1, "transformer.alpha_pattern": {"(a+)+b": 4}}, "involved"),
        ({"transformer.lora_alpha": 1, "transformer.alpha_pattern": {".*.*.*b": 4}}, "involved"),
    ],
)
def test_settings_in_a_file_that_make_no_sense_are_refused(
    settings: Any, says: str, folders: Any, tmp_path: Path
) -> None:
    pipe = loaded(folders("flux"))
    file = tmp_path / "a.safetensors"
    save_file(tensors(pipe, LAYERS["flux"][:1], 1), file, {"lora_adapter_metadata": json.dumps(settings)})
    with pytest.raises(BadRequest, match=f"lora_path: .*{says}"):
        Run(pipe).wardrobe.load("bad", str(file))


@pytest.mark.parametrize("path", ["/tmp/" + "x" * 5000, "~nobody-at-all/x", "a\0b", "x/" * 4000])
def test_paths_that_cannot_be_looked_up_are_refused(path: str, folders: Any) -> None:
    with pytest.raises(BadRequest, match="lora_path"):
        Run(loaded(folders("flux"))).wardrobe.load("bad", path)


def test_an_adapter_that_is_replaced_or_unloaded_stays_with_pictures_that_have_begun(
    folders: Any, tmp_path: Path
) -> None:
    pipe = loaded(folders("stable_diffusion_3"))
    files = [
        written(tmp_path / f"{at}.safetensors", tensors(pipe, LAYERS["stable_diffusion_3"], at)) for at in range(2)
    ]
    run = Run(pipe)
    run.wardrobe.load("a", str(files[0]))
    for key in ("before", "during"):
        run.submit(key, [Wear("a")])
        run.steps(2)
    run.wardrobe.load("a", str(files[1]))
    run.submit("after", [Wear("a")])
    assert run.wardrobe.unload("a", [job.worn for job in run.studio.jobs.values()]) == 1
    run.steps()
    assert (
        torch.equal(run.latents["before"], run.latents["during"])
        or float((run.latents["before"] - run.latents["during"]).abs().max()) < 2e-5
    )
    assert float((run.latents["before"] - run.latents["after"]).abs().max()) > 0.01
    run.wardrobe.use({"adapters": [["b", str(files[0]), 1.0]]})
    run.submit("usual", None)
    run.submit("plain", [])
    run.wardrobe.use({"enabled": False})
    run.submit("off", None)
    run.steps()
    assert float((run.latents["usual"] - run.latents["before"]).abs().max()) < 2e-5
    assert float((run.latents["plain"] - run.latents["off"]).abs().max()) < 2e-5
    assert float((run.latents["plain"] - run.latents["usual"]).abs().max()) > 0.01


def test_a_model_that_runs_whole_takes_no_adapters(folders: Any) -> None:
    from phloem.core.config import Config
    from phloem.launch.pictures import _wardrobe

    pipe = loaded(folders("stable_diffusion"))
    painter, _ = models.choose(pipe, CPU, torch.float32, {})
    with pytest.raises(ConfigError, match="no adapters"):
        _wardrobe(Config.from_flat({"model_path": "x", "lora_paths": ["a=b"]}).lora, pipe, painter)
    told: list[FromEngine] = []
    Studio(painter, Settings(budget=1), told.append).submit(Draw(id="a", prompt="a", seed=0, lora=[Wear("a")]))
    assert isinstance(told[0], Painted) and (told[0].status, told[0].param) == (400, "lora")
