"""Prefill and mixed steps by one recorded step of variable size equal eager ones, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from native_support import built
from pools import pool_for, pool_of
from test_pieces import HOST, decide, same, steps

from phloem.attention import BACKENDS
from phloem.checkpoint.describe import describe
from phloem.core.batch import Batch, StepOutput
from phloem.core.config import Config
from phloem.engine.recorded import choice, flexible
from phloem.engine.recorded.flexible import FlexibleStep, FlexibleSteps
from phloem.engine.runner import ModelRunner
from phloem.kernels import _native_latent, native
from phloem.kernels.graph import RecordError
from phloem.layers.context import BuildContext
from phloem.models import load_model
from phloem.quant import method
from phloem.testing.checkpoints import tiny_checkpoint

pytestmark = pytest.mark.skipif(not built(), reason="the native library is not built (no C++ compiler?)")

CPU = torch.device("cpu")
LIMIT = 24


@pytest.fixture(scope="module", params=["llama", "gemma3", "qwen3", "qwen3_moe"])
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("llama", tmp_path_factory.mktemp("llama"))


class Engine:
    def __init__(
        self, path: Path, flexible: bool, threads: int = 2, kv: torch.dtype = torch.bfloat16, **options: Any
    ) -> None:
        ops = native.table(threads)
        quant = options.pop("quant", None)
        rows, pages = options.pop("rows", 4), options.pop("pages", 20)
        model: Any = load_model(describe(str(path)), BuildContext(ops, torch.float32, CPU, quant=method(quant)))
        specs = model.attention_specs
        self.pool = pool_for(model.memory, 64, 4, kv, CPU)
        backend = BACKENDS.module("cpu").Backend(ops, specs, CPU, kv)
        self.steps: FlexibleSteps | None = None
        if flexible:
            assert ops.recorder is not None
            recorder = ops.recorder()
            assert recorder.resizes
            self.steps = FlexibleSteps(recorder, model, backend, self.pool, HOST, LIMIT, rows, pages, **options)
        self.runner = ModelRunner(
            model, backend, self.pool, ops, 4, facts=HOST, recorded=[self.steps] if self.steps else []
        )

    def batches(self) -> list[Batch]:
        return steps(len(self.pool.groups))

    def run(self, batches: list[Batch]) -> list[StepOutput]:
        return [pending.result() for pending in [self.runner.launch(batch) for batch in batches]]


@pytest.mark.slow
@pytest.mark.parametrize("quant", [None, "int8"])
@pytest.mark.parametrize(("threads", "kv"), [(1, torch.bfloat16), (2, torch.int8)])
def test_replays_equal_eager_steps_bit_for_bit(
    family: Path, quant: str | None, threads: int, kv: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    eager = Engine(family, False, threads, kv, quant=quant)
    ours = Engine(family, True, threads, kv, quant=quant)
    assert ours.steps is not None
    served: list[bool] = []
    run = ours.steps.run

    def counted(step: Any, ready: Any) -> Any:
        found = run(step, ready)
        served.append(found is not None)
        return found

    monkeypatch.setattr(ours.steps, "run", counted)
    want = eager.run(eager.batches())
    same(ours.run(ours.batches()), want)
    assert ours.steps.graphs.refused is None
    # By hand: no wanted position; prompt logprobs want more positions than rows; two steps of the recorded kind; one
    # above the limit that wants nothing; one more; and a decode step, which has no graph of its own here.
    assert served == [True, True, True, True, False, True, True]
    for layer in range(len(ours.pool.keys)):
        assert torch.equal(ours.pool.keys[layer], eager.pool.keys[layer])
        assert torch.equal(ours.pool.values[layer], eager.pool.values[layer])
    same(ours.run(ours.batches()), eager.run(eager.batches()))  # over what the first run left in every buffer


@pytest.mark.parametrize("name", ["deepseek_v3", "deepseek_v2", "youtu"])
def test_latents_of_short_rows_are_replayed_and_prompts_are_products_of_matrices(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over borders of chunks, a prefix hit and a batch of three: the same bits as eagerly, whichever way steps go."""
    path, short = tiny_checkpoint(name, tmp_path), 16
    for module in (flexible, _native_latent):
        monkeypatch.setattr(module, "LATENT_SHORT", short)
    eager, ours = Engine(path, False), Engine(path, True)
    assert ours.steps is not None
    served: list[bool] = []
    run = ours.steps.run

    def counted(step: Any, ready: Any) -> Any:
        found = run(step, ready)
        served.append(found is not None)
        return found

    monkeypatch.setattr(ours.steps, "run", counted)
    batches = ours.batches()
    same(ours.run(batches), eager.run(eager.batches()))
    assert ours.steps.graphs.refused is None
    fits = [batch.num_tokens <= LIMIT and int(batch.query_lens.max()) <= short for batch in batches]
    assert served == fits and len(set(fits)) == 2 and max(batch.num_rows for batch in batches) == 3
    for one, other in zip(ours.pool.keys, eager.pool.keys, strict=True):
        assert torch.equal(one, other) and one.any()


def test_the_debug_mode_compares_every_replay(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = Engine(llama, True, check=True)
    assert ours.steps is not None
    ours.run(ours.batches())
    monkeypatch.setattr(FlexibleStep, "eager", lambda step, fixed, sizes: torch.zeros(sizes[2], 64))
    batch = steps()[2]
    with pytest.raises(RecordError, match="result 0"):
        ours.run([batch])


def test_larger_steps_run_eagerly(llama: Path) -> None:
    want = Engine(llama, False).run(steps())
    for options in ({"rows": 1}, {"pages": 2}):
        ours = Engine(llama, True, **options)
        assert ours.steps is not None
        same(ours.run(ours.batches()), want)


def test_recording_computes_nothing_and_tells_sizes_apart() -> None:
    ops = native.table(2)
    assert ops.recorder is not None
    recorder = ops.recorder()
    x, y = torch.randn(50, 8), torch.randn(50, 8)
    graph, out = recorder.record_sizes(lambda sizes: ops.add(x[: sizes[0]], y[: sizes[0]]), (50,))  # pyright: ignore
    for rows in (50, 1, 17):
        out.fill_(7)
        graph.replay(rows)
        assert torch.equal(out[:rows], x[:rows] + y[:rows]) and (out[rows:] == 7).all()
    with pytest.raises(ValueError, match="too close"):
        recorder.record_sizes(lambda sizes: ops.add(x, y), (50, 49))  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(RecordError, match="no call of the step"):
        recorder.record_sizes(lambda sizes: ops.add(x, y), (40,))  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(RecordError, match="other calls"):
        many = lambda sizes: [ops.add(x, y) for _ in range(sizes[0])]  # noqa: E731
        recorder.record_sizes(many, (5,))  # pyright: ignore[reportAttributeAccessIssue]


def test_a_conversion_is_no_view_in_inference_mode() -> None:
    ops = native.table(1)
    assert ops.recorder is not None
    x = torch.randn(3, 8)
    with torch.inference_mode(), pytest.raises(RecordError, match="torch's aten"):
        ops.recorder().record(lambda: ops.add(x, x).to(torch.bfloat16))


def test_the_decision_says_so() -> None:
    class Flexible:
        cuts, resizes = False, True

    decode, steps_, decisions = decide(Flexible(), chunk=512)
    assert decode is not None and isinstance(steps_, FlexibleSteps)
    assert decisions["prefill_graph"].value == "on" and "512 tokens" in decisions["prefill_graph"].reason
    assert decide(Flexible(), disable_step_graph=True)[1] is None


@pytest.mark.parametrize("kv", [torch.bfloat16, torch.int8, torch.float32, torch.float16])
def test_a_native_table_records_wherever_its_attention_keeps_the_cache(llama: Path, kv: torch.dtype) -> None:
    """The reference reads lengths on the host: with a cache of another type that is said at once, not step by step."""
    ops = native.table(2)
    model: Any = load_model(describe(str(llama)), BuildContext(ops, torch.float32, CPU))
    pool = pool_of(model.attention_specs, 64, 4, kv, CPU)
    for name in ("cpu", "reference"):
        backend = BACKENDS.module(name).Backend(ops, model.attention_specs, CPU, kv)
        decisions: list[Any] = []
        ways = choice.choose(Config().runtime, choice.Place(model, backend, pool, ops, HOST, 0), 4, 20, 64, decisions)
        told = {decision.name: decision for decision in decisions}
        if kv == torch.float16:
            assert not ways and told["step_graphs"].value == "off" and "on the host" in told["step_graphs"].reason
            continue
        assert [way.decision for way in ways] == ["step_graphs", "prefill_graph"]
        choice.record_all(ways, decisions)
        assert all(way.graphs.refused is None and way.nbytes > 0 for way in ways)
