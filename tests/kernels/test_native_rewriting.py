"""New values packed straight into the memory of a weight that is there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from linear_cases import Source, cases, make_source, needs_native

from phloem.kernels import native

pytestmark = needs_native
CPU = torch.device("cpu")
TYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture(params=cases(1, 2))
def level(request: Any) -> Any:
    yield request.param
    native.table(2, None)


def dense(rows: int, inputs: int, dtype: torch.dtype, seed: int) -> Source:
    return Source.dense_of(values(rows, inputs, dtype, seed))


def values(rows: int, inputs: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(rows, inputs, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("rows,inputs", [(16, 64), (37, 70), (48, 129), (5, 3), (64, 8)])
def test_what_is_packed_reads_back_as_it_was(level: Any, dtype: torch.dtype, rows: int, inputs: int) -> None:
    ops, tensor = native.table(level[1], level[0]), values(rows, inputs, dtype, 1)
    packed = ops.prepare_linear([Source.dense_of(tensor)], dtype, CPU)
    assert torch.equal(packed.dense(dtype), tensor)
    x = values(2, inputs, torch.float32, 2)  # what lies behind the inputs counts as nothing
    assert torch.allclose(ops.linear(x, packed)[0], x @ tensor.float().T, rtol=0.02, atol=0.05 * inputs**0.5)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("sizes", [(64, 16, 16), (48, 48), (37,), (20, 33)])
def test_new_values_lie_where_the_old_ones_lay(level: Any, dtype: torch.dtype, sizes: tuple[int, ...]) -> None:
    ops, inputs = native.table(level[1], level[0]), 70
    old = ops.prepare_linear([dense(size, inputs, dtype, at) for at, size in enumerate(sizes)], dtype, CPU)
    new = [values(size, inputs, dtype, 10 + at) for at, size in enumerate(sizes)]
    fresh = ops.prepare_linear([Source.dense_of(tensor) for tensor in new], dtype, CPU)
    places, segments = [m.data_ptr() for m in old.memory], old.segments.clone()
    assert ops.rewriting is not None
    before = [m.clone() for m in old.memory]
    write = ops.rewriting(old, [Source.dense_of(tensor) for tensor in new], dtype)
    assert write is not None
    assert all(torch.equal(a, b) for a, b in zip(old.memory, before, strict=True))  # not before it is called
    write()
    assert [m.data_ptr() for m in old.memory] == places and torch.equal(old.segments, segments)
    assert all(torch.equal(a, b) for a, b in zip(old.memory, fresh.memory, strict=True))


def test_values_of_another_type_are_converted(level: Any) -> None:
    ops, new = native.table(level[1], level[0]), values(32, 64, torch.float32, 4)
    old = ops.prepare_linear([dense(32, 64, torch.bfloat16, 3)], torch.bfloat16, CPU)
    assert ops.rewriting is not None
    write = ops.rewriting(old, [Source.dense_of(new)], torch.bfloat16)
    assert write is not None
    write()
    assert torch.equal(old.dense(torch.bfloat16), new.bfloat16())


def test_another_layout_is_left_to_be_made_anew(level: Any) -> None:
    ops = native.table(level[1], level[0])
    old = ops.prepare_linear([dense(32, 64, torch.bfloat16, 3)], torch.bfloat16, CPU)
    packed = ops.prepare_linear([make_source("Q8_0", 32, 2, 1)], torch.bfloat16, CPU)
    assert ops.rewriting is not None
    assert ops.rewriting(old, [dense(48, 64, torch.bfloat16, 3)], torch.bfloat16) is None
    assert ops.rewriting(old, [dense(32, 128, torch.bfloat16, 3)], torch.bfloat16) is None
    assert ops.rewriting(old, [dense(32, 64, torch.float32, 3)], torch.float32) is None
    assert ops.rewriting(old, [make_source("Q8_0", 32, 2, 1)], torch.bfloat16) is None
    assert ops.rewriting(packed, [dense(32, 64, torch.bfloat16, 3)], torch.bfloat16) is None
    assert ops.rewriting(torch.zeros(32, 64), [dense(32, 64, torch.bfloat16, 3)], torch.bfloat16) is None
