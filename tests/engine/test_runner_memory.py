"""The engine's runner without memory: what it reports, what it frees, and that no answer is another for it."""

from __future__ import annotations

import errno
import gc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stepping import HOST, PLACES, Bomb, LateCopies, Row, Stepper, bits, pool_of, runner_of

from phloem.attention import BACKENDS
from phloem.checkpoint.describe import describe
from phloem.core.batch import Admission, Batch
from phloem.core.errors import OutOfMemory
from phloem.core.request import SamplingParams
from phloem.engine import forward as forward_file
from phloem.engine.memory import first_line, is_out_of_memory
from phloem.engine.recorded.decode import DecodeGraphs
from phloem.engine.sampling import choose as choose_file
from phloem.kernels.ops import Ops
from phloem.layers.context import BuildContext
from phloem.models import Model, load_model
from phloem.platforms._facts import StepFacts
from phloem.testing.checkpoints import VOCAB, tiny_checkpoint

CPU = torch.device("cpu")
REQUESTS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0, "top_p": 0.9},
    {"temperature": 0.0, "repetition_penalty": 1.5, "frequency_penalty": 0.7},
    {"temperature": 1.3, "top_k": 20, "logprob": True},
    {"temperature": 0.0, "mask": True},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    path: Path = tiny_checkpoint("llama", tmp_path_factory.mktemp("llama"))
    return load_model(describe(str(path)), BuildContext(Ops(), torch.float32, CPU))


class Successor:
    """Allows the successor of the last token alone, so that a token that is counted twice or never shows."""

    def __init__(self, output: list[int]) -> None:
        self.known = list(output)

    def masks(self, sampled: Any, drafts: Any) -> Any:
        self.known += sampled
        return [bits(100 + len(self.known) + place, words=(VOCAB + 31) // 32) for place in range(1 + len(drafts))]


def serve(model: Model, streams: Any = None, verify: bool = False) -> dict[str, Any]:
    """All REQUESTS at once; a step without memory is begun anew. Gives tokens and logprobs by request."""
    freed: list[int] = []
    facts = HOST if streams is None else StepFacts()
    runner = runner_of(model, 8, facts=facts, streams=streams, give_back=lambda: freed.append(1))
    rows: list[Row] = []
    for index, request in enumerate(REQUESTS):
        params = {key: value for key, value in request.items() if key not in ("logprob", "mask")}
        options = {"return_logprob": True, "top_logprobs": 2} if "logprob" in request else {}
        row = Row(list(range(10, 22 + 3 * index)), SamplingParams(**params), options)
        if "mask" in request:
            row.follow = lambda row=row: Successor(row.tokens)
        rows.append(row)
    stepper = Stepper(runner, rows)

    def draft(place: int, row: Row) -> list[int]:
        if not verify:
            return []
        return [100 + len(row.tokens), 101 + len(row.tokens)] if row.follow else [7] * (place + 1)

    stepper.run(12, draft)
    runner.close()
    found: dict[str, Any] = {f"r{index}": row.tokens[:12] for index, row in enumerate(rows)}
    return found | {"freed": freed, "oom": stepper.starved, "logprobs": [one.token for one in rows[3].logprobs[:12]]}


@pytest.fixture(scope="module")
def undisturbed(model: Model) -> dict[str, Any]:
    found = serve(model)
    assert found["oom"] == 0 and found["r4"] == list(range(100, 112))
    return found


@pytest.mark.some(11)
@pytest.mark.slow
@pytest.mark.parametrize("verify", [False, True], ids=["plain", "verify"])
@pytest.mark.parametrize("late", [False, True], ids=["here", "late"])
@pytest.mark.parametrize("place", PLACES)
def test_no_memory_at_some_steps_changes_no_token(
    model: Model, undisturbed: dict[str, Any], place: str, late: bool, verify: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for calls in ({1}, {4, 7, 8}):
        bomb = Bomb(calls, lambda: torch.OutOfMemoryError("no memory left\nadvice"))
        owner, name = PLACES[place]
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, bomb(getattr(owner, name)))
            found = serve(model, LateCopies() if late else None, verify)
        assert bomb.thrown >= (place != "admission" or 1 in calls)
        assert len(found["freed"]) == bomb.thrown == found["oom"]
        for row in range(5):
            assert found[f"r{row}"] == undisturbed[f"r{row}"], (place, calls, row)
        assert np.allclose(found["logprobs"], undisturbed["logprobs"], atol=1e-4)


def batch_of(step: int, epoch: int = 0) -> Batch:
    tokens = np.arange(5, dtype=np.int32)
    one = np.zeros(1, np.int32)
    admission = Admission(0, "a", SamplingParams(temperature=0.0), 0, tokens, 5)
    return Batch(step, one, one + 5, one, tokens, (one[:, None] + 1,), one + 1, [admission], epoch=epoch)


def test_a_step_behind_the_failed_one_is_refused_until_a_new_epoch(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    bomb = Bomb({1}, MemoryError)
    monkeypatch.setattr(forward_file, "run_forward", bomb(forward_file.run_forward))
    runner = runner_of(model, 2)
    pending = [runner.launch(batch_of(step)) for step in range(3)]
    with pytest.raises(OutOfMemory, match="MemoryError"):
        pending[0].result()
    for one in pending[1:]:
        with pytest.raises(OutOfMemory, match="behind a step"):
            one.result()
    assert bomb.count == 1
    assert runner.launch(batch_of(3, epoch=1)).result().counts.tolist() == [1]
    runner.close()


def test_the_failed_step_holds_no_memory_when_it_is_given_back(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[torch.Tensor]] = []
    seen: list[bool] = []

    def sample(logits: torch.Tensor, *rest: Any) -> torch.Tensor:
        alive.append(weakref.ref(logits))
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr(choose_file, "sample", sample)
    runner = runner_of(model, 2, give_back=lambda: seen.append(alive[0]() is None))
    batch = batch_of(0)
    batch.admissions[0].params = SamplingParams(temperature=1.0)
    gc.disable()
    try:
        with pytest.raises(OutOfMemory, match="OutOfMemoryError: no"):
            runner.launch(batch).result()
    finally:
        gc.enable()
    assert seen == [True]
    runner.close()


def test_other_errors_stay_what_they_are(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward_file, "run_forward", Bomb({1}, lambda: RuntimeError("device lost"))(None))
    runner = runner_of(model, 2)
    with pytest.raises(RuntimeError, match="device lost"):
        runner.launch(batch_of(0)).result()
    runner.close()


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("x"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (RuntimeError("Triton Error [CUDA]: out of memory"), True),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), True),
        (OSError(errno.EACCES, "Permission denied"), False),
        (RuntimeError("shape mismatch"), False),
        (ValueError("out of memory of what came before"), False),
    ],
)
def test_which_errors_mean_that_memory_ran_out(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


def test_torch_says_so_when_a_tensor_is_too_large() -> None:
    with pytest.raises((RuntimeError, MemoryError)) as raised:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(raised.value)
    assert "\n" not in first_line(raised.value)


def test_a_graph_that_finds_no_memory_leaves_the_step_to_the_eager_path(model: Model) -> None:
    class Recorder:
        cuts = resizes = False

        def record(self, fn: Any) -> Any:
            raise torch.OutOfMemoryError("no")

    pool = pool_of(model, 1)
    backend = BACKENDS.module("reference").Backend(Ops(), model.attention_specs, CPU, torch.float32)
    recorder: Any = Recorder()
    graphs = DecodeGraphs(recorder, model, backend, pool, HOST, 2, 4)
    while graphs.graphs.idle():
        pass
    assert graphs.graphs.get(1) is None and "out of memory" in str(graphs.graphs.refused)


@pytest.mark.slow
def test_work_between_steps_that_finds_no_memory_leaves_the_steps_alone(model: Model) -> None:
    freed: list[int] = []
    runner = runner_of(model, 2, give_back=lambda: freed.append(1))
    first = runner.launch(batch_of(0))
    work = runner.between(lambda: torch.empty(2**60, dtype=torch.uint8))
    second = runner.launch(batch_of(1))
    with pytest.raises((RuntimeError, MemoryError)):
        work.result()
    assert first.result().tokens.tolist() == second.result().tokens.tolist() and not freed
    runner.close()
