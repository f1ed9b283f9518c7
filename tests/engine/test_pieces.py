"""Prefill and mixed steps in recorded pieces equal eager ones, bit for bit, at and around the edges of buckets."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from pools import pool_of
from tape import TapeRecorder

from phloem import Engine as Llm
from phloem.attention import BACKENDS, Memory
from phloem.checkpoint.describe import describe
from phloem.core.batch import FROM_DEVICE, Admission, Batch, StepOutput
from phloem.core.config import Config
from phloem.core.request import SamplingParams
from phloem.core.resolve import Decision
from phloem.engine.recorded import choice
from phloem.engine.recorded.between import Between
from phloem.engine.recorded.looks import Looks
from phloem.engine.recorded.pieces import PieceGraphs, token_buckets
from phloem.engine.runner import ModelRunner
from phloem.kernels import reference as ref
from phloem.kernels import reference_experts
from phloem.kernels.compose import linear_of
from phloem.kernels.ops import Ops, Rotation
from phloem.kvcache.pool import KVPool
from phloem.layers.context import AttentionSpec, BuildContext, Heads
from phloem.models import load_model
from phloem.platforms._facts import StepFacts
from phloem.platforms.cpu import Platform
from phloem.testing.checkpoints import tiny_checkpoint

CPU = torch.device("cpu")
HOST = Platform.facts
PAGE = 4
LIMIT = 24  # buckets 1, 2, 4, 8, 16, 24


def by_rows(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """A matrix library may add in another order for another number of rows; row by row it cannot."""
    rows = [ref.product(x[row : row + 1], weight, bias) for row in range(len(x))]
    return torch.cat(rows) if rows else ref.product(x, weight, bias)


def dense_moe(
    x: torch.Tensor, logits: torch.Tensor, gate_up: Any, down: Any, top_k: int, renormalise: bool
) -> torch.Tensor:
    """Every expert for every token, weighted: waits for no value, which a captured step must not."""
    weights, ids = reference_experts.route(logits, top_k, renormalise)
    experts = logits.shape[1]
    share = torch.zeros_like(logits, dtype=torch.float32).scatter(1, ids.long(), weights)
    total = torch.zeros_like(x)
    for expert, (wide, narrow) in enumerate(zip(gate_up.chunk(experts), down.chunk(experts), strict=True)):
        gate, up = by_rows(x, wide, None).chunk(2, -1)
        total = total + by_rows(torch.nn.functional.silu(gate) * up, narrow, None) * share[:, expert : expert + 1]
    return total


OPS = replace(Ops(), linear=linear_of(by_rows), moe=dense_moe)


@pytest.fixture(scope="module", params=["llama", "gemma3", "qwen3_moe"])
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("llama", tmp_path_factory.mktemp("llama"))


class Engine:
    """A runner on a model of its own, with pieces by `recorder` (None: eager)."""

    def __init__(self, path: Path, recorder: TapeRecorder | None, ops: Ops = OPS, **options: Any) -> None:
        self.model: Any = load_model(describe(str(path)), BuildContext(ops, torch.float32, CPU))
        specs = self.model.attention_specs
        self.pool = pool_of(specs, 64, PAGE, torch.float32, CPU)
        backend = BACKENDS.module("reference").Backend(ops, specs, CPU, torch.float32)
        self.pieces: PieceGraphs | None = None
        if recorder is not None:
            self.pieces = PieceGraphs(recorder, self.model, backend, self.pool, LIMIT, **options)
        self.runner = ModelRunner(
            self.model, backend, self.pool, ops, 4, facts=HOST, recorded=[self.pieces] if self.pieces else []
        )

    def steps(self) -> list[Batch]:
        return steps(len(self.pool.groups))

    def run(self, batches: list[Batch]) -> list[StepOutput]:
        return [pending.result() for pending in [self.runner.launch(batch) for batch in batches]]


PROMPTS = [np.random.default_rng(seed).integers(5, 300, 60).astype(np.int32) for seed in range(3)]
PARAMS = [
    SamplingParams(temperature=0.0, repetition_penalty=1.5, frequency_penalty=0.7),
    SamplingParams(temperature=1.0, top_p=0.9),
    SamplingParams(temperature=0.0),
]


def admission(row: int, length: int) -> Admission:
    return Admission(
        row, f"r{row}", PARAMS[row], 7 + row, PROMPTS[row][:length], length, return_logprob=True, top_logprobs=2,
        return_hidden=row == 1,
    )  # fmt: skip


def steps(groups: int = 1) -> list[Batch]:
    """Chunked prefill, prompt logprobs, a prefix hit, mixed steps, decode; T = 16, 17, 15, 24, 25, 23, 3."""
    own = np.arange(1, 61, dtype=np.int32).reshape(3, 20)
    own[2, :3] = own[0, :3]  # row 2 shares the first 12 tokens of row 0
    PROMPTS[2][:12] = PROMPTS[0][:12]
    known, made = [0, 0, 12], list[Batch]()

    def step(rows: dict[int, int], sample: list[int], fresh: list[int], targets: Any = None) -> None:
        ids = [
            PROMPTS[row][known[row] : known[row] + new] if new > 1 else np.array([FROM_DEVICE], np.int32)
            for row, new in rows.items()
        ]
        order = list(rows)
        made.append(
            Batch(
                len(made),
                np.array(order, np.int32),
                np.array(list(rows.values()), np.int32),
                np.array([known[row] for row in order], np.int32),
                np.concatenate(ids),
                (own[order],) * groups,
                np.array([row in sample for row in order], np.int32),
                [admission(row, [21, 12, 60][row]) for row in fresh],
                prompt_targets=targets or {},
            )
        )
        for row, new in rows.items():
            known[row] += new

    step({0: 16}, [], [0])
    step({0: 5, 1: 12}, [0, 1], [1], {1: np.concatenate([PROMPTS[1][1:12], [-1]]).astype(np.int32)})
    step({0: 1, 1: 1, 2: 13}, [0, 1], [2])
    step({0: 1, 1: 1, 2: 22}, [0, 1], [])
    known[2] = 12
    step({2: 25}, [], [])
    known[2] = 12
    step({2: 23}, [2], [])
    step({0: 1, 1: 1, 2: 1}, [0, 1, 2], [])
    assert [batch.num_tokens for batch in made] == [16, 17, 15, 24, 25, 23, 3]
    return made


def same(got: list[StepOutput], want: list[StepOutput]) -> None:
    for a, b in zip(got, want, strict=True):
        assert a.tokens.tolist() == b.tokens.tolist() and a.counts.tolist() == b.counts.tolist()
        assert a.failed == b.failed == {}
        assert a.logprobs == b.logprobs and a.prompt_logprobs == b.prompt_logprobs
        assert {row: x.tolist() for row, x in a.hidden.items()} == {row: x.tolist() for row, x in b.hidden.items()}


def same_cache(got: KVPool, want: KVPool) -> None:
    for layer in range(len(got.keys)):
        a, b = (torch.stack((pool.keys[layer], pool.values[layer]), 1) for pool in (got, want))
        assert torch.equal(a, b)
        assert not a[0].any()  # padding writes nothing, not even to the scratch page


@pytest.mark.some(3)
@pytest.mark.slow
@pytest.mark.parametrize("check", [False, True])
def test_pieces_equal_eager_steps_bit_for_bit(family: Path, check: bool) -> None:
    recorder = TapeRecorder()
    eager, ours = Engine(family, None), Engine(family, recorder, check=check)
    assert ours.pieces is not None
    with torch.inference_mode():
        ours.pieces.graphs.record_all()
    assert recorder.recorded == 6 and ours.pieces.graphs.refused is None
    want, got = eager.run(eager.steps()), ours.run(ours.steps())
    same(got, want)
    same_cache(ours.pool, eager.pool)
    assert recorder.replays == 6 * (1 + check)  # all but the step of 25 tokens
    assert any(output.prompt_logprobs for output in want) and any(output.hidden for output in want)
    # Again over what the first run left in every buffer.
    same(ours.run(ours.steps()), eager.run(eager.steps()))


def test_pieces_and_attention_alternate_and_end_at_the_last_attention(llama: Path) -> None:
    ours = Engine(llama, TapeRecorder())
    assert ours.pieces is not None
    with torch.inference_mode():
        step = ours.pieces.graphs._record(16)
    layers = len(ours.model.attention_specs)
    assert step is not None and step.graph.graphs == layers and len(step.graph.parts) == 2 * layers  # type: ignore[attr-defined]
    heads, size = ours.model.attention_specs[0].heads, ours.model.attention_specs[0].head_size
    # One buffer between pieces, of the largest bucket, for all layers.
    assert ours.pieces.nbytes == 1000 + LIMIT * heads * size * 4 == ours.runner.graph_bytes


def test_recorded_when_wanted_again_and_not_for_decode_beside_decode_graphs(llama: Path) -> None:
    recorder = TapeRecorder()
    ours = Engine(llama, recorder)
    batches = steps()[:2]
    ours.run(batches)
    assert recorder.recorded == 0  # 16 and 24: each wanted once
    ours.run(batches)
    assert recorder.recorded == 2 and recorder.replays == 2
    assert ours.pieces is not None
    ours.pieces._decodes = False
    for _ in range(3):
        ours.run([*batches, decode_step()])
    assert recorder.recorded == 2


def decode_step() -> Batch:
    table = np.arange(1, 41, dtype=np.int32).reshape(2, 20)
    ones = np.ones(2, np.int32)
    return Batch(9, np.array([0, 1], np.int32), ones, np.array([21, 12], np.int32), ones * -1, (table,), ones)


@pytest.mark.slow
@pytest.mark.parametrize("at", [0, 2])
def test_out_of_memory_while_capturing_leaves_the_eager_path(llama: Path, at: int) -> None:
    recorder = TapeRecorder(torch.OutOfMemoryError("no room"), at)
    ours = Engine(llama, recorder)
    assert ours.pieces is not None
    for _ in range(3):
        same(ours.run(ours.steps()), Engine(llama, None).run(steps()))
    assert recorder.recorded == 0 and "out of memory at 16 tokens" in ours.pieces.graphs.describe()


@pytest.mark.slow
def test_a_step_that_waits_for_a_value_is_refused_with_the_reason(tmp_path: Path) -> None:
    path = tiny_checkpoint("qwen3_moe", tmp_path)
    ours = Engine(path, TapeRecorder(), Ops())  # the reference experts ask which tokens are theirs
    assert ours.pieces is not None
    for _ in range(2):
        same(ours.run(ours.steps()), Engine(path, None, Ops()).run(steps()))
    assert "nonzero_numpy is not permitted" in ours.pieces.graphs.describe()


def test_pieces_are_dropped_when_weights_moved(llama: Path) -> None:
    recorder = TapeRecorder()
    ours, eager = Engine(llama, recorder), Engine(llama, None)
    assert ours.pieces is not None
    with torch.inference_mode():
        ours.pieces.graphs.record_all()
    for engine in (ours, eager):
        weight = engine.model.layers[0].mlp.gate_up.weight
        weight.value = weight.value * 1.5  # elsewhere in memory: the pieces still read the old one
    want = eager.run(steps()[:2])
    with pytest.raises(AssertionError):
        same(ours.run(steps()[:2]), want)
    ours.runner.drop_graphs()
    assert ours.runner.graph_bytes == 0
    same(ours.run(steps()[:2]), want)
    same(ours.run(steps()[:2]), want)
    assert recorder.recorded == 6 + 2


def test_what_a_failing_step_leaves_is_not_seen_by_the_next(llama: Path) -> None:
    """NaN of a longer step stays behind in the buffer between pieces; padding must not read it."""
    recorder = TapeRecorder()
    ours, eager = Engine(llama, recorder), Engine(llama, None)
    assert ours.pieces is not None
    with torch.inference_mode():
        ours.pieces.graphs.record_all()
    (buffer,) = ours.pieces._between._outs.values()
    with torch.inference_mode():
        buffer.fill_(float("nan"))
    same(ours.run(ours.steps()), eager.run(eager.steps()))
    assert buffer.isfinite().all()


@pytest.mark.parametrize("limit", [0, 1, 5, 24, 300, 1000, 2048])
def test_buckets_are_few_and_grow(limit: int) -> None:
    sizes = token_buckets(limit)
    assert sizes == sorted(set(sizes)) and (sizes[-1] == limit if limit else sizes == [])
    assert all(size % 4 == 0 for size in sizes[:-1] if size > 2) and len(sizes) <= 40
    for small, large in pairwise(sizes):
        assert large <= (2 * small if small < 16 else 1.5 * small if small < 256 else 1.125 * small)


def test_attention_gets_the_true_tokens_alone() -> None:
    pool: Any = SimpleNamespace(group_of=[0])
    between, seen = Between(pool, Ops(), 8, Looks()), list[Any]()

    def step(spec: Any, heads: Heads) -> Any:
        turn = heads.rotation
        seen.append([heads.q.shape, heads.k.shape, heads.v.shape, heads.sinks, turn and turn.positions.tolist()])
        return heads.q + 1

    q, kv, sinks, spec = torch.ones(8, 2, 4), torch.ones(8, 1, 4), torch.ones(2), AttentionSpec(0, 2, 1, 4, 1.0)
    between.begin(Memory(pool, [step]), 3)
    out = between.attend(spec, Heads(q, kv, kv, sinks, Rotation(torch.arange(8), torch.ones(9, 2, 2), False)))
    assert out.shape == (8, 2, 4) and (out[:3] == 2).all() and not out[3:].any()
    between.attend(spec, Heads(q, kv, kv))
    shapes = [(3, 2, 4), (3, 1, 4), (3, 1, 4)]
    assert seen == [[*shapes, sinks, [0, 1, 2]], [*shapes, None, None]]


# Settings


RECORDABLE: Any = SimpleNamespace(name="some", recordable=True, ops=Ops())


class Cuttable:
    attention_specs: list[AttentionSpec] = []
    late_residual = False

    def trunk(self) -> None: ...

    def conclude(self) -> None: ...


def decide(
    recorder: Any, chunk: int = 8192, model: Any = None, backend: Any = None, **settings: Any
) -> tuple[Any, Any, dict[str, Decision]]:
    """The decode steps, the other ones, and the decisions."""
    decisions: list[Decision] = []
    pool: Any = SimpleNamespace(device=CPU, groups=(), memory=(), page_size=16)
    ops = replace(Ops(name="some"), recorder=recorder and (lambda: recorder))
    where = choice.Place(model or Cuttable(), backend or RECORDABLE, pool, ops, StepFacts(), 2**30)  # type: ignore[arg-type]
    found = choice.choose(Config.from_flat(settings).runtime, where, 4, 8, chunk, decisions)
    decode = [way for way in found if way.decision == "step_graphs"]
    other = [way for way in found if way.decision != "step_graphs"]
    told = {decision.name: decision for decision in decisions}
    return decode[0] if decode else None, other[0] if other else None, told


@pytest.mark.parametrize(
    ("settings", "chunk", "limit"),
    [
        ({}, 8192, 2048),
        ({}, 512, 512),
        ({"piecewise_cuda_graph_max_tokens": 4096}, 8192, 4096),
        ({"piecewise-cuda-graph-max-tokens": 4096}, 1024, 1024),
    ],
)
def test_limit(settings: dict[str, Any], chunk: int, limit: int) -> None:
    recorder = TapeRecorder()
    decode, pieces, decisions = decide(recorder, chunk, **settings)
    assert pieces.graphs.sizes[-1] == limit == decisions["piecewise_graphs"].value
    assert pieces.graphs._budget == 2**28
    # One recorder, so one memory pool.
    assert decode._step.recorder is recorder is pieces._trunk.recorder


def test_reasons_to_run_eagerly() -> None:
    class Whole:
        cuts, resizes = False, False

    def off(*args: Any, **settings: Any) -> tuple[bool, str]:
        decode, pieces, decisions = decide(*args, **settings)
        assert pieces is None and decisions["piecewise_graphs"].value == "off"
        assert (decode is None) == (decisions["step_graphs"].value == "off")
        return decode is not None, decisions["piecewise_graphs"].reason

    assert off(TapeRecorder(), disable_piecewise_cuda_graph=True) == (True, "as asked")
    assert off(TapeRecorder(), disable_step_graph=True) == (False, "as asked")
    assert off(None) == (False, "the op table 'some' cannot record")
    assert "'some' records whole decode steps" in off(Whole())[1]
    assert "where its last attention ends" in off(TapeRecorder(), model=object())[1]


def test_a_backend_that_plans_on_the_host_still_gets_pieces() -> None:
    backend = SimpleNamespace(name="planner", recordable=False, ops=Ops())
    decode, pieces, decisions = decide(TapeRecorder(), backend=backend)
    assert decode is None and pieces is not None
    assert decisions["step_graphs"].reason == "the attention backend 'planner' plans each step on the host"


def test_everything_is_recorded_before_ready(llama: Path, caplog: pytest.LogCaptureFixture) -> None:
    recorder = TapeRecorder()
    ours = Engine(llama, recorder)
    decisions = [Decision("a", 1, "b"), Decision("piecewise_graphs", LIMIT, "")]
    with caplog.at_level("INFO", "phloem"):
        choice.record_all([ours.pieces], decisions)
    assert recorder.recorded == 6 and "recording piecewise_graphs: 6 of 6" in caplog.text
    assert decisions[1].reason.startswith("6 of 6") and "before ready, as asked" in decisions[1].reason
    same(ours.run(ours.steps()), Engine(llama, None).run(steps()))
    assert recorder.replays == 6


def test_the_server_can_record_before_it_is_ready(llama: Path) -> None:
    """On a CPU: whole steps in the thread that builds, replayed in the runner's."""
    settings: dict[str, Any] = {"max_running_requests": 4, "max_total_tokens": 256, "threads": 1, "dtype": "bfloat16"}
    settings |= {"speculative_algorithm": "none"}  # steps of drafts have more sizes
    params = {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True}
    answers: list[Any] = []
    for before in (False, True):
        with Llm(model_path=str(llama), device="cpu", record_graphs_before_ready=before, **settings) as engine:
            info = engine.get_server_info()
            found = {name: (value, reason) for name, value, reason in info["decisions"]}
            assert info["record_graphs_before_ready"] == before
            if found["step_graphs"][0] == "off":
                assert found["piecewise_graphs"][0] == "off"
                pytest.skip(found["step_graphs"][1])  # no native library here
            assert found["prefill_graph"][1].startswith("1 of 1") == before
            (state,) = info["internal_states"]
            assert bool(state["graph_bytes"]) == before
            assert found["step_graphs"][1].startswith("4 of 4") == before == ("graphs" in info["phases"])
            answers.append(engine.generate("hello there", params)["text"])
    assert answers[0] == answers[1]
