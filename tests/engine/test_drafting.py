"""Drafts of a model beside the host: the passes follow one another on the device, and are waited for once."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from pools import pool_for

from phloem.core.batch import Batch, Drafting
from phloem.core.memory import Paged
from phloem.engine.drafting import DraftWork
from phloem.engine.transfer import LastTokens
from phloem.kernels.ops import Ops

CPU = torch.device("cpu")
READS = ("cpu", "numpy", "tolist", "item", "__bool__", "__int__", "__index__")


class Model:
    """Drafts follow from the last token that was read and its position."""

    attention_specs: list[Any] = []
    memory: list[Any] = []
    hidden_size = 2
    weight_bytes = 0

    def greedy(self, hidden_LN: torch.Tensor) -> torch.Tensor:
        return (7 * hidden_LN[:, 0] + hidden_LN[:, 1] + 3).long() % 101


class Forward:
    """Hidden states are the tokens and their positions. As of a recording, its result is overwritten by the next."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self._out = torch.zeros(64, 2)

    def run(self, step: Any, ready: Any) -> torch.Tensor:
        inputs = step.inputs
        both = torch.stack([inputs.input_ids.float(), inputs.positions.float()], 1)[inputs.logit_index]
        self.sizes.append(len(inputs.input_ids))
        out = self._out[: len(both)]
        out.copy_(both)
        return out


def batch_of(counts: list[int], lens: list[int], known: int = 9) -> Batch:
    rows = len(counts)
    ids = np.arange(20, 20 + sum(lens), dtype=np.int32)
    starts = np.array([known - length for length in lens], np.int32)
    plan = Drafting(np.array(counts, np.int32), starts, np.array(lens, np.int32), ids)
    return Batch(
        5, np.arange(rows, dtype=np.int32)[::-1].copy(), np.ones(rows, np.int32), np.full(rows, known - 1, np.int32),
        np.arange(50, 50 + rows, dtype=np.int32), (np.arange(1, 1 + 4 * rows, dtype=np.int32).reshape(rows, 4),),
        np.ones(rows, np.int32), drafts=np.array(counts, np.int32), drafting=plan,
    )  # fmt: skip


def work(on_host: bool, forward: Forward) -> tuple[DraftWork, LastTokens]:
    pool = pool_for([Paged(1, 4, 4)], 40, 4, torch.float32, CPU)
    last = LastTokens(4, CPU, on_host, None)
    slots: Any = SimpleNamespace(columns=SimpleNamespace(greedy=np.ones(4, bool)))
    loaded: Any = SimpleNamespace(model=Model(), carries=None)
    return DraftWork(loaded, forward, Ops(), pool, slots, last), last  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("counts", "lens"),
    [([5], [1]), ([3, 1, 4], [2, 1, 3]), ([0, 2], [4, 1]), ([1, 1], [1, 1]), ([2, 0, 0], [1, 0, 5])],
)
def test_drafts_are_those_of_the_host_and_waited_for_once(
    counts: list[int], lens: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = batch_of(counts, lens)
    there, here = Forward(), Forward()
    wanted, _ = work(True, here)[0].run(batch)
    device, last = work(False, there)
    last.values.fill_(77)
    waits: Counter[str] = Counter()
    for name in READS:
        real = getattr(torch.Tensor, name)

        def counted(self: torch.Tensor, *args: Any, real: Any = real, name: str = name) -> Any:
            waits[name] += 1
            return real(self, *args)

        monkeypatch.setattr(torch.Tensor, name, counted)
    found, _ = device.run(batch)
    monkeypatch.undo()
    assert waits == {"tolist": 1}
    assert there.sizes == here.sizes and len(there.sizes) >= max(counts)
    assert found.input_ids.tolist() == wanted.input_ids.tolist() and found.outputs.tolist() == wanted.outputs.tolist()
    assert found.query_lens.tolist() == [1 + count for count in counts] and found.drafting is None
    assert (last.values == 77).all()  # the last tokens of the slots are the model's, not the drafts


def test_nothing_to_read_is_nothing_to_wait_for() -> None:
    batch = batch_of([0, 0], [0, 0])
    found, _ = work(False, Forward())[0].run(batch)
    assert found.input_ids.tolist() == batch.input_ids.tolist() and found.drafting is None
