"""Kernels compiled beside the loading: which ones, that no step needs another one, and the process that compiles."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from phloem.core.config import Config
from phloem.core.errors import ConfigError
from phloem.core.memory import groups_of
from phloem.core.resolve import Decision
from phloem.engine import worker
from phloem.engine.warmup import ahead, warm
from phloem.engine.warmup.shapes import run_shape, step_shapes
from phloem.kernels.triton import ahead as kernels
from phloem.kvcache.pool import KVPool
from phloem.platforms import _compiled
from phloem.platforms._compiled import Compiled, Service, Tally

COMMON = {
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "max_position_embeddings": 4096,
    "hidden_act": "silu",
    "vocab_size": 1000,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
}
MOE = {"num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 128, "norm_topk_prob": True}


def plan_of(family: str = "llama", cache: Path | None = None, **changes: Any) -> ahead.Plan:
    config = {**COMMON, **(MOE if "moe" in family else {}), "model_type": family}
    settings: dict[str, Any] = {
        "context": 4096, "vocab": 1000, "ops": "triton", "dtype": "bfloat16", "kv_dtype": "bfloat16", "page": None,
        "running": 96, "chunk": 2048, "target": ("cuda", 90, 32), "processors": 132, "cache": str(cache or "none"),
        "processes": 2,
    }  # fmt: skip
    return ahead.Plan(model_type=family, config=config, **settings | changes)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("ops", ["triton", "invariant"])
@pytest.mark.parametrize("capability", [80, 90])
def test_no_step_of_any_length_needs_a_kernel_that_was_not_compiled_before(
    family: str, ops: str, capability: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels.AHEAD, "capability", capability)
    plan = plan_of(family, ops=ops)
    notes, shapes = ahead.trace(plan)
    assert 10 < len(notes.found) < 90 and shapes[0] == (1, 1, 0) and len(shapes) < 40
    random = np.random.default_rng(0)
    more = kernels.Notes()
    more.found |= notes.found
    with torch.inference_mode(), more.taken():
        need = ahead.need_of(plan)
        memory = need.model.memory
        pool = KVPool(memory, [2] * len(groups_of(memory)), need.page_size, need.kv_dtype, torch.device("meta"))
        for _ in range(60):
            rows = int(random.integers(1, plan.running + 1))
            tokens = rows if random.random() < 0.4 else int(random.integers(rows, plan.chunk + 1))
            run_shape(need, pool, (tokens, rows, 0))
    new = [note.name for key, note in more.found.items() if key not in notes.found]
    assert not new


@pytest.mark.slow
def test_a_few_shapes_launch_all_that_was_found() -> None:
    plan = plan_of("qwen3_moe")
    notes, shapes = ahead.trace(plan)
    again = kernels.Notes()
    with torch.inference_mode(), again.taken():
        need = ahead.need_of(plan)
        memory = need.model.memory
        pool = KVPool(memory, [2] * len(groups_of(memory)), need.page_size, need.kv_dtype, torch.device("meta"))
        for shape in shapes:
            run_shape(need, pool, shape)
    assert set(again.found) == set(notes.found)


def test_integers_that_change_from_step_to_step_are_not_specialised_on() -> None:
    """Across steps of many shapes, every integer argument that takes several values is named so in its kernel, or
    is always a multiple of 16."""
    plan = plan_of("qwen3_moe")
    seen: dict[tuple[str, str], set[int]] = {}
    plain: set[tuple[str, str]] = set()

    class All(kernels.Notes):
        def add(self, kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            # Of one form of a kernel: what its constants change with is compiled apart anyway.
            form = tuple(sorted((k, v) for k, v in kwargs.items()))
            for param, value in zip(kernel.params, args, strict=False):
                if type(value) is int and not param.is_constexpr:
                    place = (f"{kernel.fn.__name__} {form}", param.name)
                    seen.setdefault(place, set()).add(value)
                    if not param.do_not_specialize:
                        plain.add(place)

    notes = All()
    with torch.inference_mode(), notes.taken():
        need = ahead.need_of(plan)
        memory = need.model.memory
        pool = KVPool(memory, [2] * len(groups_of(memory)), need.page_size, need.kv_dtype, torch.device("meta"))
        for tokens, rows in [
            (1, 1),
            (2, 2),
            (3, 3),
            (7, 7),
            (16, 16),
            (17, 1),
            (33, 2),
            (100, 5),
            (1000, 7),
            (1024, 1),
        ]:
            run_shape(need, pool, (tokens, rows, 0))
    classes = {place: {(value == 1, value % 16 == 0) for value in seen[place]} for place in plain}
    constant = [place for place in plain if len(classes[place]) > 1]
    # Several layers of one model differ in widths and strides: only what differs within one place counts.
    assert not [place for place in constant if place[1] in {"tokens", "rows", "pairs", "splits", "segments"}]
    assert {name for _, name in seen} & {"rows", "pairs", "splits"}


@pytest.mark.parametrize(("capability", "walks"), [(90, True), (100, True), (80, False), (0, False)])
def test_where_descriptors_are_read_by_hardware_every_form_of_many_rows_is_noted(
    capability: int, walks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both products of each form, and the kernel that they are tried against; a switch leaves them out."""
    monkeypatch.setattr(kernels.AHEAD, "capability", capability)
    need = ahead.need_of(plan_of("qwen3_moe"))
    found = ahead.noted(need, [(512, 1, 0)])[0].found.values()
    names = [note.name for note in found]
    assert names.count("_walk_grouped") == (6 if walks else 0) and names.count("_grouped") == 2
    monkeypatch.setenv("PHLOEM_MOE_TRIAL", "off")
    assert "_walk_grouped" not in [note.name for note in ahead.noted(need, [(512, 1, 0)])[0].found.values()]
    monkeypatch.setenv("PHLOEM_MOE_TRIAL", "perhaps")
    if walks:
        with pytest.raises(ConfigError, match="PHLOEM_MOE_TRIAL: 'perhaps' is not one of on, 1, off, 0"):
            ahead.noted(need, [(512, 1, 0)])


SPARSE = {
    **{"n_routed_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 128, "n_shared_experts": 1},
    **{"norm_topk_prob": True, "routed_scaling_factor": 2.5, "first_k_dense_replace": 0, "attention_bias": False},
}
GLM = {**SPARSE, "n_group": 1, "topk_group": 1, "use_qk_norm": True, "partial_rotary_factor": 0.5}
DEEPSEEK = {
    **{**SPARSE, "n_group": 4, "topk_group": 2, "q_lora_rank": 64, "kv_lora_rank": 64, "num_key_value_heads": 8},
    **{"qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32, "rope_interleave": True},
}


@pytest.mark.parametrize(("family", "config"), [("glm4_moe", GLM), ("deepseek_v3", DEEPSEEK)])
def test_experts_of_any_router_need_no_value_of_the_device(family: str, config: dict[str, Any]) -> None:
    """On tensors without data a step that asked for one would raise; and it could not be recorded."""
    plan = plan_of(family, running=8, chunk=256)
    plan.config.update(config)
    with torch.inference_mode(), kernels.Notes().taken():
        need = ahead.need_of(plan, 2)
    names = {note.name for note in ahead.noted(need, [(1, 1, 0), (8, 8, 0), (200, 1, 0)])[0].found.values()}
    assert {"_route", "_few_up", "_few_down", "_place_expert", "_grouped", "_sum_choices"} <= names


def test_layers_that_differ_are_all_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every sixth layer of this family sees everything, the others a window: two layers do not stand for all."""
    extra = {"layer_types": ["sliding_attention"] * 5 + ["full_attention"], "sliding_window": 64}
    extra |= {"num_hidden_layers": 6, "query_pre_attn_scalar": 64, "hidden_activation": "gelu_pytorch_tanh"}
    plan = plan_of("gemma3_text", running=4, chunk=32)
    plan.config.update(extra)
    notes, _ = ahead.trace(plan)
    windows = {dict(note.kwargs)["WINDOW"] for note in notes.found.values() if note.name == "_attention"}
    assert windows == {True, False}


def test_shapes_cover_each_small_size_and_the_largest() -> None:
    shapes = step_shapes(256, 8192, 131072)
    assert {(rows, rows, 0) for rows in range(1, 65)} <= set(shapes)
    assert (256, 256, 0) in shapes and (8192, 1, 0) in shapes and all(tokens >= rows for tokens, rows, _ in shapes)
    assert {(1, 1, 131071), (256, 256, 131071)} <= set(shapes)
    assert step_shapes(1, 1, 10) == [(1, 1, 0), (1, 1, 9)] and step_shapes(1, 1, 1) == [(1, 1, 0)]
    assert max(tokens for tokens, *_ in step_shapes(4, 64, 20)) <= 64


@pytest.mark.slow  # ten kernels and more, compiled
def test_the_process_compiles_for_a_device_that_is_not_here_and_the_cache_outlives_it(tmp_path: Path) -> None:
    small = plan_of(cache=tmp_path, running=2, chunk=16)
    service = Service("phloem.speculation.ahead", ahead.msgspec.to_builtins(small))
    found, why = service.wait(200)
    assert found is not None, why
    assert not found["errors"] and found["cached"] == 0 and found["kernels"] >= 10 and found["shapes"][0] == [1, 1, 0]
    cubins = list(tmp_path.rglob("*.cubin"))
    assert len(cubins) == found["kernels"]
    before = {path: path.stat().st_mtime_ns for path in cubins}
    found, why = Service("phloem.speculation.ahead", ahead.msgspec.to_builtins(small)).wait(200)
    assert found is not None and {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.cubin")} == before
    assert found["cached"] == found["kernels"] == len(cubins)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import sys; sys.exit('no such kernel')", "exit status 1: no such kernel"),
        ("print('nonsense')", "no answer"),
        ("import time; time.sleep(60)", "not done after"),
    ],
)
def test_a_process_that_fails_gives_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, reason: str
) -> None:
    (tmp_path / "fake_service.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found, why = Service("fake_service", {"x": 1}).wait(1.0 if "sleep" in code else 30)
    assert found is None and reason in why


def test_what_is_compiled_after_ready_is_told() -> None:
    tally = Tally()
    tally.note("_attention", False, 1.5)
    tally.note("_attention", True, 0.01)
    tally.ready = True
    tally.note("_rms_norm", True, 0.01)
    assert tally.late == []
    tally.note("_rms_norm", False, 0.4)
    assert tally.facts() == {"compiled": 2, "loaded": 2, "seconds": 1.92, "late": ["_rms_norm"]}


def test_the_cache_is_named_after_device_and_versions_and_old_ones_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    target = ("cuda", 90, 32)
    one, other = Compiled(target, 132, "H100"), Compiled(target, 132, "H200")
    assert one.directory != other.directory and one.directory.parent == tmp_path / "phloem" / "kernels"
    monkeypatch.setattr(_compiled, "_version", lambda package: "99")
    assert Compiled(target, 132, "H100").directory != one.directory
    for number in range(8):
        (one.directory.parent / f"old{number}").mkdir(parents=True)
    one.directory.mkdir()
    _compiled._drop_old(one.directory)
    assert one.directory.is_dir() and len(list(one.directory.parent.iterdir())) == _compiled.KEPT + 1
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "mine"))
    assert Compiled(target, 132, "H100").directory == tmp_path / "mine"


class FakeService:
    def __init__(self, found: dict[str, Any] | None, why: str = "") -> None:
        self.answer, self.closed = (found, why), False

    def wait(self, seconds: float) -> tuple[dict[str, Any] | None, str]:
        return self.answer

    def close(self) -> None:
        self.closed = True


def need_on_host() -> Any:
    """A model on the host, for the dummy steps."""
    from phloem.attention import BACKENDS
    from phloem.engine.choices.sizing import Need
    from phloem.kernels.ops import Ops
    from phloem.layers.context import BuildContext
    from phloem.models import FAMILIES

    cpu = torch.device("cpu")
    config = {**COMMON, "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 1}
    model = FAMILIES.get("llama")(config, BuildContext(Ops(), torch.float32, cpu), 4096)
    checkpoint: Any = SimpleNamespace(
        format="dummy", gguf=None, files=[], name="none", path=Path("none"), model_type="none"
    )
    model.load(checkpoint, None)
    backend = BACKENDS.module("reference").Backend(Ops(), model.attention_specs, cpu, torch.float32)
    return Need(model, backend, Ops(), torch.float32, 16, 4096, 4, 32, True)


@pytest.mark.parametrize("works", [True, False])
def test_the_engine_is_ready_after_its_dummy_steps_with_or_without_the_process(tmp_path: Path, works: bool) -> None:
    found = {
        "shapes": [[1, 1, 0], [17, 1, 0]],
        "kernels": 20,
        "cached": 3,
        "seconds": 4.0,
        "slowest": ["_attention", 2.0],
        "errors": [],
    }
    service: Any = FakeService(found if works else None, "exit status 1: broken")
    compiled: Any = SimpleNamespace(tally=Tally(), directory=tmp_path)
    warming = warm.Warming(compiled, service)
    decisions, others = list[Decision](), list[Any]()
    warming.finish(need_on_host(), torch.device("cpu"), decisions, others.append)
    assert not compiled.tally.ready
    assert len(others) == 1 and len(others[0]) == warming.told()["steps"], "what is run, other ranks are told"
    warming.ready()
    facts = warming.told()
    assert compiled.tally.ready and facts["cache"] == str(tmp_path)
    (decision,) = decisions
    if works:
        assert (
            facts["kernels"] == 20 and facts["steps"] == 2 and "17 of 20 compiled beside the loading" in decision.reason
        )
    else:
        assert facts["steps"] > 5 and "not compiled beside the loading: exit status 1: broken" in decision.reason


def test_the_process_is_not_started_where_nothing_is_compiled_or_nobody_knows_what() -> None:
    started: list[dict[str, Any]] = []

    class Fake:
        def begin(self) -> None: ...

        def start(self, module: str, plan: dict[str, Any]) -> Any:
            assert module == "phloem.speculation.ahead"
            started.append(plan)
            return FakeService(None)

    assert warm.start(SimpleNamespace(compiled=None), {}, None) is None  # type: ignore[arg-type]
    platform: Any = SimpleNamespace(compiled=Fake())
    refused = warm.start(platform, {"x": 1}, "quantised")
    assert refused is not None and refused.service is None and refused.reason == "quantised" and not started
    begun = warm.start(platform, {"x": 1}, None)
    assert begun is not None and started == [{"x": 1}]
    begun.close()
    assert begun.service.closed  # type: ignore[union-attr]


@pytest.mark.slow
def test_the_process_takes_no_device() -> None:
    code = "import phloem.speculation.ahead, torch; assert not torch.cuda.is_initialized()"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_processes_that_start_together_drop_old_caches_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(9):
        (tmp_path / str(number)).mkdir()
    plain = Path.is_dir

    def is_dir(path: Path, **more: Any) -> bool:
        found = plain(path, **more)
        if path.name in "345":  # another process drops it between two looks
            path.rmdir()
        return found

    monkeypatch.setattr(Path, "is_dir", is_dir)
    _compiled._drop_old(tmp_path / "0")
    assert len(list(tmp_path.iterdir())) == 1 + _compiled.KEPT


def test_one_process_at_a_time_fills_a_cache(tmp_path: Path) -> None:
    """The second one waits until the first is done, or has died."""
    code = "import sys; from pathlib import Path; from phloem.engine.warmup import ahead; print('here', flush=True)\n"
    code += "with ahead._turn(Path(sys.argv[1])): print(sys.argv[2], flush=True)"
    with ahead._turn(tmp_path):
        other = subprocess.Popen([sys.executable, "-c", code, str(tmp_path), "in"], stdout=subprocess.PIPE, text=True)
        assert other.stdout is not None and other.stdout.readline() == "here\n"
        with pytest.raises(subprocess.TimeoutExpired):
            other.wait(0.5)
    assert other.communicate(timeout=60)[0] == "in\n"
    file = tmp_path / "no folder"
    file.touch()
    with ahead._turn(file):  # no lock can be had: nobody waits
        pass


def test_of_a_machine_one_rank_compiles_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Node 0 has ranks 0 to 3, of which the first is no executor; rank 4 is the first of the next machine."""
    begun: list[Any] = []
    settings: dict[str, Any] = {"tp_size": 8, "nnodes": 2, "node_rank": 1, "dist_init_addr": "h:1"}
    config = Config.from_flat(settings)
    monkeypatch.setattr(worker, "_bounded", lambda config, checkpoint, decisions: checkpoint)
    monkeypatch.setattr(worker, "machine_of", lambda *given: SimpleNamespace(platform="a platform"))
    monkeypatch.setattr(worker, "_warming", lambda *given: begun.append(rank))
    monkeypatch.setattr(worker, "_executor", lambda *given: None)
    monkeypatch.setattr(warm, "start", lambda platform, plan, why: begun.append((rank, why)))
    nothing: Any = None
    for rank in range(1, 8):
        team: Any = SimpleNamespace(groups=SimpleNamespace(rank=rank))
        worker.build_executor(config, nothing, team, nothing)
    told = "another rank of this machine has a process for that"
    assert begun == [(1, told), (2, told), (3, told), 4, (5, told), (6, told), (7, told)]
