"""Recurrent mixers and layer norm of the native table: what plain torch says, at odd sizes, whatever the rows."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from linear_cases import levels
from native_support import built

from phloem.kernels import native
from phloem.kernels import reference_models as models
from phloem.kernels import reference_scan as reference
from phloem.kernels.ops import Ops

pytestmark = pytest.mark.skipif(not built(), reason="the native CPU kernels are not built")
STARTS = torch.tensor([0, 3, 4, 4, 17], dtype=torch.int32)  # a row without tokens among them
ROWS, TOKENS = 4, 17


@pytest.fixture(params=levels())
def ops(request: pytest.FixtureRequest) -> Ops:
    return native.table(2, request.param)


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + len(shape)))


def same(got: tuple[torch.Tensor, torch.Tensor], want: tuple[torch.Tensor, torch.Tensor]) -> None:
    for ours, theirs in zip(got, want, strict=True):
        assert ours.shape == theirs.shape and theirs.abs().max() > 0.1
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=2e-5)


def conv_case(channels: int, taps: int, bias: bool) -> tuple[Any, ...]:
    wide = numbers(TOKENS, channels + 5)
    state = numbers(ROWS, channels, taps - 1, seed=1)
    bias_C = numbers(channels, seed=2) if bias else None
    return wide[:, 3 : 3 + channels], numbers(channels, taps), bias_C, state, STARTS


def scan_case(heads: int, size: int, groups: int, n: int) -> tuple[Any, ...]:
    mixed = numbers(TOKENS, heads * size + 2 * groups * n)
    x, b, c = mixed.split([heads * size, groups * n, groups * n], -1)
    step = numbers(TOKENS, heads).abs() * 0.3
    shaped = x.unflatten(-1, (heads, size)), step, -numbers(heads, seed=3).abs()
    parts = b.unflatten(-1, (groups, n)), c.unflatten(-1, (groups, n)), numbers(heads, seed=4)
    return *shaped, *parts, numbers(ROWS, heads, size, n, seed=5), STARTS


def selective_case(channels: int, n: int) -> tuple[Any, ...]:
    x, b, c = numbers(TOKENS, channels + 2 * n).split([channels, n, n], -1)
    step, decay = numbers(TOKENS, channels).abs() * 0.3, -numbers(channels, n, seed=3).abs()
    return x, step, decay, b, c, numbers(channels, seed=4), numbers(ROWS, channels, n, seed=5), STARTS


def delta_case(heads: int, n: int, size: int, *, by_entry: bool = False) -> tuple[Any, ...]:
    q, k = (torch.nn.functional.normalize(numbers(TOKENS, heads, n, seed=seed), dim=-1) for seed in (1, 2))
    decay = numbers(TOKENS, heads, n, seed=8) if by_entry else numbers(TOKENS, heads)
    gates = -decay.abs(), numbers(TOKENS, heads, seed=6).sigmoid()
    return q, k, numbers(TOKENS, heads, size, seed=3), *gates, numbers(ROWS, heads, n, size, seed=7), STARTS, n**-0.5


CASES: dict[str, tuple[str, tuple[Any, ...]]] = {
    "convolution": ("causal_conv", (*conv_case(37, 4, True), True)),
    "convolution, narrow": ("causal_conv", (*conv_case(3, 3, False), False)),
    "convolution, one tap": ("causal_conv", (*conv_case(16, 2, True), True)),
    "scan": ("mamba2_scan", scan_case(6, 4, 2, 16)),
    "scan, odd": ("mamba2_scan", scan_case(3, 5, 1, 13)),
    "selective": ("selective_scan", selective_case(12, 16)),
    "selective, odd": ("selective_scan", selective_case(7, 5)),
    "delta": ("gated_delta", delta_case(4, 16, 32)),
    "delta, odd": ("gated_delta", delta_case(3, 7, 21)),
    "delta, by entry": ("gated_delta", delta_case(4, 32, 32, by_entry=True)),
    "delta, by entry, odd": ("gated_delta", delta_case(3, 7, 21, by_entry=True)),
}


@pytest.mark.parametrize("name", CASES)
def test_a_step_gives_what_plain_torch_gives(ops: Ops, name: str) -> None:
    op, arguments = CASES[name]
    kept = [one.clone() for one in arguments if isinstance(one, torch.Tensor)]
    same(getattr(ops, op)(*arguments), getattr(reference, op)(*arguments))
    now = [one for one in arguments if isinstance(one, torch.Tensor)]
    assert all(torch.equal(*pair) for pair in zip(kept, now, strict=True))  # states that were read are as they were


def alone(op: Any, arguments: tuple[Any, ...], row: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same of one row, token by token."""
    first, last = STARTS[row], STARTS[row + 1]
    by_token = [one for one in arguments if isinstance(one, torch.Tensor) and len(one) == TOKENS]
    (state,) = [one for one in arguments if isinstance(one, torch.Tensor) and one.ndim > 2 and len(one) == ROWS]
    state, outs = state[row : row + 1], [torch.empty(0)]
    ends = torch.tensor([0, 1], dtype=torch.int32)
    for at in range(int(first), int(last)):
        some = [
            one[at : at + 1] if any(one is token for token in by_token)
            else ends if one is STARTS
            else state if isinstance(one, torch.Tensor) and one.ndim > 2 and len(one) == ROWS
            else one
            for one in arguments
        ]  # fmt: skip
        out, state = op(*some)
        outs.append(out)
    return torch.cat(outs[1:]) if len(outs) > 1 else outs[0], state


@pytest.mark.parametrize("name", CASES)
def test_neither_neighbours_nor_chunks_nor_threads_change_a_bit(ops: Ops, name: str) -> None:
    op, arguments = CASES[name]
    out, after = getattr(ops, op)(*arguments)
    for row, (first, last) in enumerate(pairwise(STARTS.tolist())):
        one, state = alone(getattr(ops, op), arguments, row)
        assert torch.equal(one.flatten(), out[first:last].flatten()) and torch.equal(state[0], after[row])
    single = getattr(native.table(1, None), op)(*arguments)
    many = getattr(native.table(2, None), op)(*arguments)
    assert all(torch.equal(*pair) for pair in zip(single, many, strict=True))


@pytest.mark.parametrize("size", [1, 3, 16, 37, 130])
@pytest.mark.parametrize("bias", [True, False])
def test_layer_norm_is_that_of_torch(ops: Ops, size: int, bias: bool) -> None:
    wide, weight = numbers(5, 2 * size) + 3, numbers(size)
    bias_N = numbers(size, seed=9) if bias else None
    for x in (wide[:, :size], wide.view(5, 2, size)):
        torch.testing.assert_close(
            ops.layer_norm(x, weight, bias_N, 1e-5), models.layer_norm(x, weight, bias_N, 1e-5), atol=2e-5, rtol=2e-5
        )


def test_shapes_that_do_not_fit_are_refused() -> None:
    ops, arguments = native.table(1), list(CASES["scan"][1])
    arguments[1] = arguments[1][:, :-1]
    with pytest.raises(ValueError, match=r"dt must be \[17, 6\]"):
        ops.mamba2_scan(*arguments)
    x, weight, bias, state, starts, silu = CASES["convolution"][1]
    with pytest.raises(ValueError, match="query_start must have 5 entries"):
        ops.causal_conv(x, weight, bias, state, starts[:-1], silu)
    with pytest.raises(ValueError, match="state must be"):
        ops.causal_conv(x, weight, bias, state[:, :-1], starts, silu)
