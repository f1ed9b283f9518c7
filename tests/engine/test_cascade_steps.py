"""Steps whose rows share pages: what reaches attention, in tensors of their own and in a recorded step's fixed ones."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from test_graphs import FakeRecorder

from phloem.attention import sharing_of
from phloem.attention._cascade import Sharing
from phloem.attention.reference import Backend
from phloem.attention.triton import Backend as TritonBackend
from phloem.core.batch import Batch
from phloem.core.memory import Group
from phloem.engine.inputs import FixedInputs, Step
from phloem.engine.recorded.decode import DecodeGraphs, sharing_sizes
from phloem.engine.transfer import LastTokens
from phloem.engine.wanted import Wanted
from phloem.kernels.ops import Ops, PagedBatch
from phloem.layers.context import AttentionSpec
from phloem.platforms._facts import StepFacts, float8_of

CPU = torch.device("cpu")
CHEAP = Sharing(tile=4, programs=8, splits=(16, 8), token_bytes=1 << 30, part_bytes=1)
POOL: Any = SimpleNamespace(
    routes=None,
    groups=(Group("pages", 0, (0,)), Group("state", 0, (2,)), Group("pages", 64, (1,))),
    page_size=16,
    device=CPU,
)


def step(sharing: Sharing | None = CHEAP, common: int = 12, new: tuple[int, ...] = (1, 1, 1), rows: int = 3) -> Step:
    table = np.arange(1, 1 + rows * 20, dtype=np.int32).reshape(rows, 20)
    table[2, :common] = table[0, :common]
    lens = np.array(new, np.int32)
    batch = Batch(
        step=1,
        slots=np.arange(rows, dtype=np.int32),
        query_lens=lens,
        prefix_lens=np.full(rows, 200, np.int32),
        input_ids=np.arange(lens.sum(), dtype=np.int32),
        tables=(table, np.ones((rows, 2), np.int32), table + 100),
        outputs=np.ones(rows, np.int32),
    )
    return Step(batch, Wanted.of(batch), POOL, LastTokens(4, CPU, False, None), sharing)


@pytest.mark.parametrize("new", [(1, 1, 1), (2, 9, 1)])
def test_attention_is_told_who_shares_in_each_group_of_pages(new: tuple[int, ...]) -> None:
    full, state, window = step(new=new).inputs.rows()
    assert isinstance(full, PagedBatch) and isinstance(window, PagedBatch) and not isinstance(state, PagedBatch)
    assert full.shared is not None and full.shared.lens.tolist() == [192, 0, 192]
    assert full.shared.members.tolist() == ([0, 2] if new[0] == 1 else [0, 1, 11])
    assert full.token_slots.tolist() == [slot for slot in step(None, new=new).inputs.rows()[0].token_slots.tolist()]  # type: ignore[union-attr]
    assert window.shared is None  # of what is shared nothing lies in its window


def test_nobody_is_told_where_it_is_off_or_nothing_is_shared() -> None:
    for plain in (step(None), step(common=0)):
        assert all(getattr(rows, "shared", None) is None for rows in plain.inputs.rows())


def test_a_recorded_step_takes_sharing_and_its_end() -> None:
    fixed = FixedInputs(POOL, 4, 4, 4, 20, on_host=False, shared=True)
    full = fixed.inputs.rows()[0]
    assert isinstance(full, PagedBatch) and full.shared is not None
    for common, lens in ((12, [192, 0, 192, 0]), (0, [0, 0, 0, 0]), (8, [128, 0, 128, 0])):
        step(common=common).put(fixed, 4)
        assert full.shared.lens.tolist() == lens
        assert full.shared.group_start.tolist() == ([0, 2, 2] if common else [0, 0, 0])
        assert full.seq_lens.tolist() == [201, 201, 201, 1] and full.page_table[0].tolist() == list(range(1, 21))


def test_steps_that_share_have_graphs_of_their_own() -> None:
    recorder: Any = FakeRecorder()
    spec = AttentionSpec(0, 4, 2, 16, 0.25)
    model: Any = SimpleNamespace(forward=lambda batch: batch.input_ids.unsqueeze(1))
    pool: Any = SimpleNamespace(**{**vars(POOL), "groups": POOL.groups[:1]})
    backend = Backend(Ops(), [spec], CPU, torch.float32)
    graphs = DecodeGraphs(recorder, model, backend, pool, StepFacts(), 8, 20, shared=True)
    assert graphs.graphs.sizes == [4, 6, 8] and graphs.decision == "shared_step_graphs"

    def run(common: int) -> torch.Tensor | None:
        made = step(common=common)
        one = replace(made.batch, tables=made.batch.tables[:1])
        return graphs.run(Step(one, Wanted.of(one), pool, LastTokens(4, CPU, False, None), CHEAP), lambda: None)

    assert run(0) is None and run(0) is None and run(12) is None and recorder.recorded == 0
    hidden = run(12)
    assert hidden is not None and hidden.flatten().tolist() == [0, 1, 2] and recorder.recorded == 1
    assert run(0) is None  # a plain graph serves that


def test_sizes_of_sharing_steps() -> None:
    assert sharing_sizes(256) == [4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256]
    assert sharing_sizes(100)[-2:] == [96, 100] and sharing_sizes(2) == [2] and sharing_sizes(1) == []


def test_backends_say_whether_they_share_and_why() -> None:
    spec = AttentionSpec(0, 32, 8, 128, 0.1)
    assert sharing_of(Backend(Ops(), [spec], CPU, torch.float32))[0] is None
    pytest.importorskip("triton")
    found, why = sharing_of(TritonBackend(Ops(name="triton"), [spec], CPU, torch.bfloat16))
    assert found is not None and (found.tile, found.token_bytes) == (16, 4096) and "once a step" in why
    assert sharing_of(TritonBackend(Ops(name="invariant"), [spec], CPU, torch.bfloat16))[0] is None


def test_float8_kinds_follow_the_architecture() -> None:
    kinds = {name: float8_of(name) for name in ("gfx942:sramecc+:xnack-", "gfx950", "gfx1201", "")}
    assert [kind == torch.float8_e4m3fnuz for kind in kinds.values()] == [True, False, False, False]
