"""The engine's runner without memory: what it reports, what it frees, and that no answer is another for it."""

from __future__ import annotations

import errno
import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pools import cache_of, pool_of

from phloem.attention import BACKENDS
from phloem.checkpoint.describe import describe
from phloem.core.batch import Admission, Batch
from phloem.core.errors import OutOfMemory
from phloem.core.messages import Submit, Tokens, pack_ids
from phloem.core.request import SamplingParams
from phloem.engine import runner as runner_file
from phloem.engine.decode import DecodeGraphs
from phloem.engine.masks import Masks
from phloem.engine.memory import first_line, is_out_of_memory
from phloem.engine.penalties import Penalties
from phloem.engine.runner import ModelRunner
from phloem.kernels.ops import Ops
from phloem.layers.context import BuildContext
from phloem.models import Model, load_model
from phloem.platforms._streams import Arriving
from phloem.scheduler.scheduler import Scheduler, ScheduleSettings
from phloem.testing.checkpoints import VOCAB, tiny_checkpoint
from phloem.testing.driver import Unfold

CPU = torch.device("cpu")
PAGE = 8
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


class Streams:
    """Copies that have not ended the first times that somebody asks: the next step, if there is one, begins before."""

    def up(self, arrays: Any) -> list[torch.Tensor]:
        return [torch.from_numpy(np.array(array)) for array in arrays]

    def down(self, tensors: Any) -> Arriving:
        asked: list[int] = []

        class Event:
            def query(self) -> bool:
                asked.append(1)
                return len(asked) > 3

            def synchronize(self) -> None: ...

        return Arriving([tensor.clone() for tensor in tensors], Event())


class Successor:
    """Allows the successor of the last token alone, so that a token that is counted twice or never shows."""

    can_jump, error = False, None

    def __init__(self) -> None:
        self.known: list[int] = []

    def ready(self) -> bool:
        return True

    def admit(self, output: Any) -> None:
        self.known = list(output)

    def mask(self, sampled: list[int]) -> Any:
        self.known += sampled
        words = np.zeros((VOCAB + 31) // 32, np.int32)
        token = 100 + len(self.known)
        words[token // 32] = np.uint32(1 << token % 32).view(np.int32)
        return words


class Bomb:
    """Raises on these calls of what it wraps."""

    def __init__(self, calls: set[int], error: Callable[[], Exception]) -> None:
        self.calls, self.error, self.count, self.thrown = calls, error, 0, 0

    def __call__(self, function: Any) -> Any:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            if self.count in self.calls:
                self.thrown += 1
                raise self.error()
            return function(*args, **kwargs)

        return wrapped


def serve(model: Model, streams: Any = None, chunk: int = 12, runner: Any = None) -> dict[str, Any]:
    """All REQUESTS at once through scheduler and runner; gives tokens and logprobs by request."""
    pool = pool_of(model.attention_specs, 40, PAGE, torch.float32, CPU)
    backend = BACKENDS.module("reference").Backend(Ops(), model.attention_specs, CPU, torch.float32)
    freed: list[int] = []
    made = ModelRunner(model, backend, pool, Ops(), 8, streams=streams, give_back=lambda: freed.append(1))
    got: dict[str, Any] = {"freed": freed}

    unfold = Unfold()

    def take(message: Any) -> None:
        for one in unfold.chunks(message) if isinstance(message, Tokens) else []:
            entry = got.setdefault(one.id, ([], [], []))
            entry[0].extend(one.tokens)
            entry[1].extend(one.logprobs.values if one.logprobs else [])
            if one.finish is not None:
                entry[2].append(one.finish.type)

    settings = ScheduleSettings(8, 256, VOCAB, chunked_prefill_size=chunk, debug_invariants=True)
    cache = cache_of(pool.num_pages[0], PAGE)
    prepare: Any = lambda submit, prompt: Successor() if submit.id.endswith("mask") else None  # noqa: E731
    scheduler = Scheduler(made, settings, cache, take, prepare=prepare)
    for index, request in enumerate(REQUESTS):
        params = {key: value for key, value in request.items() if key not in ("logprob", "mask")}
        scheduler.receive(
            Submit(
                id=f"r{index}{'mask' if 'mask' in request else ''}",
                input_ids=pack_ids(list(range(10, 22 + 3 * index))),
                sampling=SamplingParams(max_new_tokens=12, sampling_seed=index, **params),
                return_logprob="logprob" in request,
                logprob_start=3 if "logprob" in request else -1,
                top_logprobs=2 if "logprob" in request else 0,
            )
        )
    for _ in range(500):
        if not scheduler.live and not scheduler.inflight:
            break
        scheduler.step()
    made.close()
    assert not scheduler.live and cache.held_pages == 0 and cache.available_pages == cache.total_pages
    got["oom"] = scheduler.meter.out_of_memory
    return got


PLACES = {
    "forward": (runner_file, "run_forward"),
    "sampling": (runner_file, "sample"),
    "logprobs": (runner_file, "position_logprobs"),
    "mask": (Masks, "_fill"),
    "masking": (Masks, "apply_"),
    "penalties": (Penalties, "apply_"),
    "admission": (Penalties, "__init__"),
    "landing": (runner_file, "_give_out"),
}


@pytest.fixture(scope="module")
def undisturbed(model: Model) -> dict[str, Any]:
    found = serve(model)
    assert found["oom"] == 0 and found["r4mask"][0] == list(range(100, 112))
    return found


@pytest.mark.parametrize("late", [False, True], ids=["here", "late"])
@pytest.mark.parametrize("place", PLACES)
def test_no_memory_at_some_steps_changes_no_token(
    model: Model, undisturbed: dict[str, Any], place: str, late: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for calls in ({1}, {4, 7, 8}):
        bomb = Bomb(calls, lambda: torch.OutOfMemoryError("no memory left\nadvice"))
        owner, name = PLACES[place]
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, bomb(getattr(owner, name)))
            found = serve(model, Streams() if late else None)
        assert bomb.thrown >= (place != "admission" or 1 in calls)
        assert len(found["freed"]) == bomb.thrown
        # A step that had begun before the one ahead of it failed to land may fail too; it is dropped anyway.
        assert found["oom"] == bomb.thrown - (late and place == "landing" and 8 in calls)
        for name in ("r0", "r1", "r2", "r4mask"):
            assert found[name] == undisturbed[name], (place, calls, name)
        tokens, logprobs, ends = found["r3"]
        assert tokens == undisturbed["r3"][0] and ends == ["length"]
        assert np.allclose(logprobs, undisturbed["r3"][1], atol=1e-4)


def runner_of(model: Model, **options: Any) -> ModelRunner:
    pool = pool_of(model.attention_specs, 9, PAGE, torch.float32, CPU)
    backend = BACKENDS.module("reference").Backend(Ops(), model.attention_specs, CPU, torch.float32)
    return ModelRunner(model, backend, pool, Ops(), 2, **options)


def batch_of(step: int, epoch: int = 0) -> Batch:
    tokens = np.arange(5, dtype=np.int32)
    one = np.zeros(1, np.int32)
    admission = Admission(0, "a", SamplingParams(temperature=0.0), 0, tokens, 5)
    return Batch(step, one, one + 5, one, tokens, one[:, None] + 1, np.ones(1, np.bool_), [admission], epoch=epoch)


def test_a_step_behind_the_failed_one_is_refused_until_a_new_epoch(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    bomb = Bomb({1}, MemoryError)
    monkeypatch.setattr(runner_file, "run_forward", bomb(runner_file.run_forward))
    runner = runner_of(model)
    pending = [runner.launch(batch_of(step)) for step in range(3)]
    with pytest.raises(OutOfMemory, match="MemoryError"):
        pending[0].result()
    for one in pending[1:]:
        with pytest.raises(OutOfMemory, match="behind a step"):
            one.result()
    assert bomb.count == 1
    assert runner.launch(batch_of(3, epoch=1)).result().tokens[0] >= 0
    runner.close()


def test_the_failed_step_holds_no_memory_when_it_is_given_back(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[torch.Tensor]] = []
    seen: list[bool] = []

    def sample(logits: torch.Tensor, *rest: Any) -> torch.Tensor:
        alive.append(weakref.ref(logits))
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr(runner_file, "sample", sample)
    runner = runner_of(model, give_back=lambda: seen.append(alive[0]() is None))
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
    monkeypatch.setattr(runner_file, "run_forward", Bomb({1}, lambda: RuntimeError("device lost"))(None))
    runner = runner_of(model)
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
        def record(self, fn: Any) -> Any:
            raise torch.OutOfMemoryError("no")

    pool = pool_of(model.attention_specs, 9, PAGE, torch.float32, CPU)
    backend = BACKENDS.module("reference").Backend(Ops(), model.attention_specs, CPU, torch.float32)
    graphs = DecodeGraphs(Recorder(), model, backend, pool, 2, 4)
    assert not graphs.graphs.idle() and "out of memory" in str(graphs.graphs.refused)
