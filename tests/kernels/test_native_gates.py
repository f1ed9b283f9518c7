"""States, factors and gates of the native table: what plain torch gives, of strided and whole tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from linear_cases import levels
from native_support import built

from phloem.kernels import native
from phloem.kernels import reference_models as models
from phloem.kernels import reference_scan as scan

if TYPE_CHECKING:
    from phloem.kernels.ops import Ops

pytestmark = pytest.mark.skipif(not built(), reason="the native CPU kernels are not built")


@pytest.fixture(params=levels())
def ops(request: pytest.FixtureRequest) -> Ops:
    return native.table(2, request.param)


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + len(shape)))


FRESH = torch.tensor([False, True, False])
WIDE, HEADS = numbers(5, 90), numbers(5, 3, 2 * 37)
CASES: dict[str, tuple[Any, str, tuple[Any, ...]]] = {
    "join": (models, "join", (WIDE[:, 3:40], WIDE[:, 41:60])),
    "scale": (models, "scale", (WIDE[:, 7:60], 0.3)),
    "scale, heads": (models, "scale", (numbers(5, 3, 8), -2.0)),
    "scale rows": (models, "scale_rows", (WIDE[:, 7:60], numbers(5, seed=2))),
    "scale by one number": (models, "scale_rows", (WIDE[:, 7:60], numbers(1, seed=2))),
    "mul": (models, "mul", (WIDE[:, :37], WIDE[:, 50:87])),
    "mul, heads": (models, "mul", (HEADS[..., :37], HEADS[..., 37:])),
    "sigmoid": (models, "sigmoid_mul", (WIDE[:, :37], WIDE[:, 50:87])),
    "sigmoid, heads": (models, "sigmoid_mul", (numbers(5, 3, 37), HEADS[..., 37:])),
    "sigmoid, a number": (models, "sigmoid_mul", (WIDE[:, :37], WIDE[:, 50:51])),
    "norm": (models, "gated_rms_norm", (WIDE[:, :36], WIDE[:, 50:86], numbers(36), 1e-5, 0, False)),
    "norm, groups": (models, "gated_rms_norm", (WIDE[:, :36], WIDE[:, 50:86], numbers(36), 1e-5, 12, False)),
    "norm first": (models, "gated_rms_norm", (WIDE[:, :36], WIDE[:, 50:86], numbers(36), 1e-5, 12, True)),
    "norm, heads": (models, "gated_rms_norm", (numbers(5, 3, 37), HEADS[..., 37:], numbers(37), 1e-6, 0, True)),
    "steps": (scan, "step_sizes", (30 * WIDE[:, :7], numbers(7), 0.01, 20.5)),
    "decays": (scan, "decays", (numbers(3, 21),)),
    "gates": (scan, "delta_gates", (WIDE[:, :7], WIDE[:, 8:15], numbers(7), numbers(7, seed=4))),
    "gates, entries": (scan, "delta_gates", (numbers(5, 3, 9), WIDE[:, 8:11], numbers(3, 9), numbers(3, 1))),
    "repeat": (scan, "repeat_heads", (numbers(5, 3, 9), 2, False)),
    "repeat, tiled": (scan, "repeat_heads", (numbers(5, 3, 9), 2, True)),
    "read states": (scan, "read_states", (numbers(6, 3, 41), torch.tensor([4, 0, 4]), FRESH)),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_it_gives_what_plain_torch_gives(ops: Ops, name: str) -> None:
    where, op, arguments = CASES[name]
    got, want = getattr(ops, op)(*arguments), getattr(where, op)(*arguments)
    pairs = zip(got, want, strict=True) if isinstance(want, tuple) else [(got, want)]
    for ours, theirs in pairs:
        assert ours.shape == theirs.shape and theirs.abs().max() > 0.1
        torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=2e-6)


def test_states_go_where_they_are_told_and_nowhere_else(ops: Ops) -> None:
    pool = numbers(6, 2, 3000)[:, 0].unflatten(1, (3, 1000))  # states that lie apart
    after, places = numbers(2, 3, 1000, seed=5), torch.tensor([5, 1])
    want = pool.clone()
    want[places] = after
    ops.write_states(pool, places, after)
    assert torch.equal(pool, want)


def test_recorded_states_are_those_of_the_replays_rows() -> None:
    ops = native.table(2)
    assert ops.recorder is not None
    pool, reads, writes = numbers(6, 3, 41), torch.tensor([0, 0]), torch.tensor([0, 0])
    fresh = torch.tensor([True, True])

    def step() -> torch.Tensor:
        before = ops.read_states(pool, reads, fresh)
        ops.write_states(pool, writes, ops.scale(before, 2.0))
        return before

    graph, _ = ops.recorder().record(step)
    kept = pool.clone()
    reads.copy_(torch.tensor([3, 2]))
    writes.copy_(torch.tensor([4, 5]))
    fresh.copy_(torch.tensor([False, True]))
    graph.replay()
    assert torch.equal(pool[4], 2 * kept[3]) and torch.equal(pool[1:4], kept[1:4])
    assert not pool[5].any()
