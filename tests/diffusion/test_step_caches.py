"""Step caches: the decisions of diffusers' own, rows together as alone, nothing changed where it is off."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("diffusers", reason="pictures need diffusers: pip install 'phloem[diffusion]'")
pytest.importorskip("transformers")

import torch

from phloem.checkpoint.pictures import pictures_of
from phloem.core.caching import NONE, StepCaching, parsed
from phloem.core.errors import BadRequest
from phloem.core.messages import Draw, FromEngine, Painted
from phloem.diffusion import models
from phloem.diffusion.engine import Settings, Studio
from phloem.testing.films import KINDS as FILMS
from phloem.testing.films import tiny_films
from phloem.testing.pictures import tiny_pictures

pytestmark = pytest.mark.slow
CPU = torch.device("cpu")
# Random weights change far more from step to step than trained ones: thresholds that some steps are below.
FAMILIES = {"flux": 0.68, "qwen_image": 1.06, "stable_diffusion_3": 0.65, "wan_two": 0.54}
FAMILIES |= {"hunyuan_video": 0.6, "z_image": 0.6}
STEPS = 12
# The plain distance: polynomials that were fitted to real models say nothing of these.
TEA = StepCaching("teacache", 0.6, first=0, coefficients=(0.0, 0.0, 0.0, 1.0, 0.0))


def load(folder: Path, family: str, **overrides: Any) -> Any:
    kind = tiny_films if family in FILMS else tiny_pictures
    made = kind(folder, family, **overrides)
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
    run.submit("a", step_cache=StepCaching(threshold=FAMILIES[family]), **guided)
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


@pytest.mark.some(3)
@pytest.mark.parametrize("family", list(FAMILIES))
def test_rows_that_compute_and_rows_that_do_not_share_passes_and_are_what_they_are_alone(
    tmp_path: Path, family: str
) -> None:
    films, usual = family in FILMS, FAMILIES[family]
    layers = "n_layers" if family == "z_image" else "num_layers"
    pipe = load(tmp_path, family, **({} if films else {layers: 3}))
    jobs: list[dict[str, Any]] = [
        {"step_cache": StepCaching(threshold=usual), "prompt": "a cat"},
        {"step_cache": TEA, "seed": 3, "steps": 8, "prompt": "a large red house on the river"},
        {"step_cache": None, "seed": 4},
        {
            "step_cache": StepCaching("dbcache", usual, last=0 if films else 1, warmup=2),
            "seed": 5,
            "negative": "a dog",
            **({"true_cfg": 3.0} if family in ("flux", "hunyuan_video") else {}),
        },
    ]
    alone, together = Run(pipe), Run(pipe)
    for at, fields in enumerate(jobs):
        alone.submit(str(at), **fields)
        alone.steps()
    together.painter.step_caches = alone.painter.step_caches  # they stand between the blocks already
    saved, mixed = alone.saved, 0
    for cache in alone.painter.step_caches:
        of_rows = cache._of_rows

        def counted(forward: Any, given: Any, at: int, cache: Any = cache, of_rows: Any = of_rows) -> Any:
            nonlocal mixed
            computes = [turn is None or turn.computes for turn in cache._turns]
            mixed += any(computes) and not all(computes)
            return of_rows(forward, given, at)

        cache._of_rows = counted
    for at, fields in enumerate(jobs):
        together.submit(str(at), **fields)
        together.steps(2)
    together.steps()
    assert alone.saved == 2 * saved > 0
    assert mixed or family == "z_image"  # whose rows share steps with those of texts as long as theirs
    for at in range(len(jobs)):
        assert float((together.latents[str(at)] - alone.latents[str(at)]).abs().max()) < 5e-5


def test_a_pass_that_fails_leaves_what_is_kept(tmp_path: Path) -> None:
    run, calm = Run(load(tmp_path / "a", "flux")), Run(load(tmp_path / "b", "flux"))
    for one in (run, calm):
        one.submit("a", step_cache=StepCaching(threshold=FAMILIES["flux"]))
        one.submit("b", step_cache=StepCaching(threshold=FAMILIES["flux"]), seed=8)
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
    run = Run(load(tmp_path, "ltx"))
    run.submit("a", step_cache=StepCaching(threshold=0.1))
    last = run.told[-1]
    assert isinstance(last, Painted) and (last.status, last.param) == (400, "cache")
    run.told.clear()
    run.submit("b", step_cache=NONE, steps=2)
    run.steps()
    assert not run.painter.step_caches


def poly(coefficients: tuple[float, ...], value: float) -> float:
    return sum(one * value ** (len(coefficients) - 1 - at) for at, one in enumerate(coefficients))


@pytest.mark.parametrize("family", ["flux", "qwen_image", "stable_diffusion_3", "wan", "hunyuan_video", "z_image"])
def test_teacache_is_that_of_a_loop_written_from_its_paper(tmp_path: Path, family: str) -> None:
    """Beside the wrapped model one computes every step whole, and what TeaCache adds is put together here."""
    threshold = 0.6
    run = Run(load(tmp_path / "ours", family))
    rule = StepCaching("teacache", threshold, first=0, coefficients=TEA.coefficients)
    unguided: dict[str, dict[str, Any]] = {"flux": {}, "hunyuan_video": {}, "qwen_image": {"true_cfg": 1.0}}
    guided = unguided.get(family, {"guidance": 0.0 if family == "z_image" else 1.0})
    run.submit("a", step_cache=rule, **guided)
    run.steps()
    other = Run(load(tmp_path / "theirs", family))
    model = other.painter.transformer
    first = model.get_submodule(other.painter.block_lists[0])[0]
    last = model.get_submodule(other.painter.block_lists[-1])[-1]
    state: dict[str, Any] = {"step": 0, "sum": 0.0, "skipped": 0, "before": None, "rest": None}

    def begins(module: Any, args: Any, options: Any) -> None:
        import inspect

        given = inspect.signature(module.forward).bind(*args, **options).arguments
        signal, step = other.painter.modulated(module, given)[0], state["step"]
        state["input"] = given[other.painter.states].clone()
        if state["before"] is not None:
            far = float((signal - state["before"]).abs().mean() / state["before"].abs().mean())
            state["sum"] += poly(TEA.coefficients, far)
        state["skip"] = 0 < step < STEPS - 1 and state["sum"] < threshold
        state["sum"] = state["sum"] if state["skip"] else 0.0
        state["before"], state["step"] = signal, step + 1

    def ends(_: Any, __: Any, made: Any) -> Any:
        pair = isinstance(made, tuple)
        place = 0 if other.painter.states_first else 1
        states = made[place] if pair else made
        if state["skip"]:
            state["skipped"] += 1
            states = state["input"] + state["rest"]
        else:
            state["rest"] = states - state["input"]
        return (*made[:place], states, *made[place + 1 :]) if pair else states

    first.register_forward_pre_hook(begins, with_kwargs=True)
    last.register_forward_hook(ends)
    other.submit("a", **guided)
    other.steps()
    assert 0 < state["skipped"] < STEPS - 2
    assert sum(cache.idle for cache in run.painter.step_caches) == state["skipped"]
    assert float((run.latents["a"] - other.latents["a"]).abs().max()) < 2e-5


def test_dbcache_warms_up_rests_between_and_computes_the_last_blocks(tmp_path: Path) -> None:
    """With a threshold that all steps are below, the steps that are computed are those of the rule alone."""
    run = Run(load(tmp_path, "flux", num_layers=2, num_single_layers=2))
    blocks = sum(len(run.painter.transformer.get_submodule(name)) for name in run.painter.block_lists)
    computed = [0] * blocks
    at = 0
    for name in run.painter.block_lists:
        for block in run.painter.transformer.get_submodule(name):
            block.forward = _before(block.forward, lambda at=at: computed.__setitem__(at, computed[at] + 1))
            at += 1
    run.submit("a", step_cache=StepCaching("dbcache", 100.0, first=1, last=1, warmup=3, in_a_row=2))
    run.steps()
    assert computed == [STEPS] + [3 + 3] * (blocks - 2) + [STEPS]  # 3, then one of three
    run.submit("b", step_cache=StepCaching("dbcache", 1e-9, first=1, last=1))
    run.submit("c")
    run.steps()
    assert float((run.latents["b"] - run.latents["c"]).abs().max()) == 0
    run.told.clear()
    run.submit("d", step_cache=StepCaching("dbcache", 0.1, first=blocks, last=0))
    while run.studio.step():
        pass
    last = run.told[-1]
    assert isinstance(last, Painted) and (last.status, last.param) == (400, "cache.fn_compute_blocks")


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("0.05", StepCaching("first_block", 0.05)),
        ("teacache", StepCaching("teacache", 0.25, first=0, warmup=1)),
        ("dbcache:0.2", StepCaching("dbcache", 0.2, warmup=4, in_a_row=3)),
        ('{"kind": "dbcache", "fn_compute_blocks": 8}', StepCaching("dbcache", 0.12, 8, 0, 4, 3)),
        ("none", NONE),
    ],
)
def test_a_step_cache_is_read_from_a_setting(text: str, rule: StepCaching) -> None:
    assert parsed(text, "x") == rule


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("tea", "'tea'"),
        ("magcache:0.1", "magcache"),
        ("teacache:-1", "x.threshold"),
        ("0.1,0.2", "0.1,0.2"),
        ("nan", "x.threshold"),
        ("{", "JSON"),
        ('{"kind": "teacache", "fn_compute_blocks": 2}', "x.fn_compute_blocks"),
        ('{"kind": "teacache", "coefficients": [1, 2]}', "x.coefficients"),
        ('{"kind": "dbcache", "max_warmup_steps": 1.5}', "x.max_warmup_steps"),
        ('{"kind": "dbcache", "steps": 1}', "x.steps"),
        ("", "not a step cache"),
        ("teacache:", "not a step cache"),
        ("none:0.3", "x.threshold"),
        ('{"kind": "none", "foo": 1}', "x.foo"),
        ('{"kind": "teacache", "coefficients": [1, 2, 3, 4, 1' + "0" * 400 + "]}", "x.coefficients"),
        ('{"a": ' * 100_000, "JSON"),
    ],
)
def test_what_is_no_step_cache_is_named(text: str, named: str) -> None:
    with pytest.raises(BadRequest, match=named):
        parsed(text, "x")
