"""How often a step on a device crosses between host and device, counted on fakes: the bound that docs/gpu.md states."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from stepping import CPU, pool_of
from torch.utils._python_dispatch import TorchDispatchMode

from phloem.attention import BACKENDS
from phloem.checkpoint.describe import describe
from phloem.core.batch import FROM_DEVICE, Admission, Batch
from phloem.core.request import SamplingParams
from phloem.engine.recorded.decode import DecodeGraphs
from phloem.engine.runner import ModelRunner
from phloem.kernels.ops import Ops
from phloem.kernels.reference_sampling import sample as reference_sample
from phloem.layers.context import BuildContext
from phloem.models import load_model
from phloem.platforms._facts import StepFacts
from phloem.platforms._streams import Streams
from phloem.testing.checkpoints import tiny_checkpoint

GREEDY_COPIES = 2  # the inputs up, the tokens down
DRAWN_COPIES = 3  # and the settings of sampling up
ROWS, STEPS = 3, 12
# What waits on the host for a value on the device.
WAITS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::unique_dim"}


class Counting(Streams):
    """Streams over the host's memory, whose transfers are counted."""

    def __init__(self) -> None:
        done: Any = SimpleNamespace(record=lambda *a: None, query=lambda: True, synchronize=lambda: None)
        stream: Any = SimpleNamespace(wait_event=lambda event: None)

        class Here:
            def __enter__(self) -> None: ...

            def __exit__(self, *error: object) -> None: ...

        cuda = SimpleNamespace(Event=lambda: done, Stream=lambda device: stream, stream=lambda stream: Here())
        super().__init__(CPU, cuda=cuda, pin=False)
        self.copies: Counter[str] = Counter()

    def up(self, arrays: Any) -> Any:
        self.copies["up"] += 1
        return super().up(arrays)

    def into(self, target: Any, parts: Any) -> None:
        self.copies["up"] += 1
        super().into(target, parts)

    def down(self, tensors: Any) -> Any:
        self.copies["down"] += len(tensors)
        return super().down(tensors)


class Watch(TorchDispatchMode):
    """Notes every op that waits."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name in WAITS:
            self.waits[name] += 1
        return func(*args, **(kwargs or {}))


class Again:
    """Stands in for a recorder: a replay runs the step again."""

    cuts, resizes = False, False

    def record(self, fn: Any) -> Any:
        result = fn()
        return SimpleNamespace(bytes=0, replay=lambda *sizes: result.copy_(fn())), result


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("llama", tmp_path_factory.mktemp("llama"))


def served(path: Path, params: SamplingParams, recorded: bool) -> tuple[Counter[str], Counter[str], list[list[int]]]:
    """Transfers and waits of the decode steps behind the first two, and the tokens of all."""
    model: Any = load_model(describe(str(path)), BuildContext(Ops(), torch.float32, CPU))
    ops = Ops(sample=lambda logits, draw: reference_draw(logits, draw))
    pool = pool_of(model, ROWS)
    backend = BACKENDS.module("reference").Backend(ops, model.attention_specs, CPU, torch.float32)
    facts, streams, watch = StepFacts(records_idle=True), Counting(), Watch()
    recorder: Any = Again()
    graphs = DecodeGraphs(recorder, model, backend, pool, facts, ROWS, 4)
    with torch.inference_mode():
        graphs.graphs.record_all()
    ways: Any = [graphs] if recorded else []
    begin = watch.__enter__  # in the thread of the steps, for good
    runner = ModelRunner(
        model, backend, pool, ops, ROWS, facts=facts, recorded=ways, streams=streams, begin=lambda: begin() and None
    )
    slots, ones = np.arange(ROWS, dtype=np.int32), np.ones(ROWS, np.int32)
    table = (np.arange(ROWS * 4, dtype=np.int32) + 1).reshape(ROWS, 4)
    tokens: list[list[int]] = []
    for number in range(STEPS):
        new = [Admission(int(s), f"r{s}", params, 7 + int(s), ones[:1], 0) for s in slots] if number == 0 else []
        ids = np.full(ROWS, FROM_DEVICE if number else 5, np.int32)
        batch = Batch(number, slots, ones, ones * number, ids, (table,), ones, admissions=new)
        if number == 2:
            streams.copies.clear()
            watch.waits.clear()
        tokens.append(runner.launch(batch).result().tokens.tolist())
    runner.close()
    return streams.copies, watch.waits, tokens


def reference_draw(logits: torch.Tensor, draw: Any) -> torch.Tensor:
    return reference_sample(logits, draw)


@pytest.mark.slow
@pytest.mark.parametrize("recorded", [True, False], ids=["recorded", "eager"])
@pytest.mark.parametrize(
    ("params", "most"),
    [(SamplingParams(temperature=0.0), GREEDY_COPIES), (SamplingParams(temperature=1.0, top_k=9), DRAWN_COPIES)],
    ids=["greedy", "drawn"],
)
def test_a_decode_step_makes_at_most_so_many_copies(
    path: Path, params: SamplingParams, most: int, recorded: bool
) -> None:
    copies, waits, _ = served(path, params, recorded)
    steps = STEPS - 2
    assert copies["up"] == steps * (most - 1) and copies["down"] == steps
    assert not [name for name in waits if params.temperature == 0.0]


@pytest.mark.slow
def test_recorded_and_eager_steps_give_the_same_tokens(path: Path) -> None:
    for params in (SamplingParams(temperature=0.0), SamplingParams(temperature=1.0, top_k=9)):
        assert served(path, params, True)[2] == served(path, params, False)[2]
