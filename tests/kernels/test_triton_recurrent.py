"""Causal convolutions and delta nets against plain torch, under the interpreter; Kimi Linear's layer over both."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from triton_support import DTYPES, assert_close, need_interpreter

from phloem.kernels import reference_scan as ref

need_interpreter()
from phloem.kernels.triton import recurrent  # noqa: E402

LENGTHS = [[1], [1, 1, 1], [0, 5, 0, 2], [17, 16, 1, 0, 33]]


def starts(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize(("channels", "width", "bias", "silu"), [(5, 4, True, True), (130, 3, False, False)])
def test_causal_conv(lengths: list[int], channels: int, width: int, bias: bool, silu: bool, dtype: torch.dtype) -> None:
    """Of a strided view, in states that a step must leave as they are."""
    x = torch.randn(sum(lengths), channels + 7).to(dtype)[:, 3 : 3 + channels]
    weight, state = torch.randn(channels, width), torch.randn(len(lengths), channels, width - 1)
    rest = weight, torch.randn(channels) if bias else None, state, starts(lengths), silu
    before = state.clone()
    got, want = recurrent.causal_conv(x, *rest), ref.causal_conv(x, *rest)
    assert_close(got[0], want[0], dtype)
    assert torch.equal(got[1], want[1]) and torch.equal(state, before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", [[1, 1], [0, 5, 0, 2], [3, 0, 9]])
@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize(("heads", "key", "value"), [(1, 12, 12), (3, 16, 20), (2, 128, 40)])
def test_gated_delta(lengths: list[int], each: bool, heads: int, key: int, value: int, dtype: torch.dtype) -> None:
    """`each`: a decay for every channel of a key, as Kimi Delta Attention has it."""
    tokens = sum(lengths)
    mixed = torch.randn(tokens, heads * (2 * key + value)).to(dtype)
    q, k, v = mixed.split([heads * key, heads * key, heads * value], -1)
    q, k = (torch.nn.functional.normalize(x.unflatten(1, (heads, key)).float(), dim=-1).to(dtype) for x in (q, k))
    v = v.unflatten(1, (heads, value))
    decay = -torch.rand(tokens, heads, key) * 3 if each else -torch.rand(tokens, heads) * 3
    state = torch.randn(len(lengths), heads, key, value)
    rest = decay, torch.rand(tokens, heads), state, starts(lengths), key**-0.5
    before = state.clone()
    got, want = recurrent.gated_delta(q, k, v, *rest), ref.gated_delta(q, k, v, *rest)
    assert_close(got[0], want[0], dtype)
    assert_close(got[1], want[1], torch.float32)
    assert torch.equal(state, before)


def test_no_rows_are_no_launch() -> None:
    nothing = torch.zeros(0, 2, 4)
    out, state = recurrent.gated_delta(
        nothing, nothing, nothing, torch.zeros(0, 2), torch.zeros(0, 2), torch.zeros(0, 2, 4, 4), starts([]), 0.5
    )
    assert out.shape == (0, 2, 4) and state.shape == (0, 2, 4, 4)
    assert recurrent.causal_conv(torch.zeros(0, 3), torch.zeros(3, 4), None, torch.zeros(0, 3, 3), starts([]))[
        0
    ].shape == (0, 3)


def test_kimi_linear_gives_the_same_logits(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A whole model on a table with these ops, whole and decoded."""
    from model_support import PROMPT, Engine

    from phloem.kernels.ops import Ops
    from phloem.testing.checkpoints import tiny_checkpoint

    path = tiny_checkpoint("kimi_linear", tmp_path_factory.mktemp("kimi"))
    plain = Engine(path)
    mine = Engine(path, ops=replace(Ops(), gated_delta=recurrent.gated_delta, causal_conv=recurrent.causal_conv))
    torch.testing.assert_close(mine.whole(PROMPT), plain.whole(PROMPT), atol=1e-4, rtol=1e-4)
    assert mine.greedy(PROMPT, 4) == plain.greedy(PROMPT, 4)
