"""Quantisation, quantised and batch-invariant matrix products, and LoRA against plain torch, under the interpreter."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from triton_support import DTYPES, assert_close, need_interpreter

from phloem.kernels import reference as ref
from phloem.kernels import reference_formats as formats
from phloem.kernels.calls import Adapters

need_interpreter()
from phloem.kernels.triton import gemm_fp8, gemm_int, invariant, lora, norm, quantise  # noqa: E402

FP8 = torch.float8_e4m3fn


def _exact(tokens: int, features: int, group: int) -> torch.Tensor:
    """Values that survive quantisation: float8 numbers times a power of two, with the limit in every group."""
    x = (torch.randn(tokens, features) * 30).to(FP8).float()
    x[:, ::group] = 448.0
    return x * 2.0 ** torch.randint(-3, 3, (tokens, 1))


@pytest.mark.parametrize("features", [96, 300, 5000])
def test_quantise_per_token(features: int) -> None:
    x = _exact(3, features, features)
    values, scale = quantise.per_token_fp8(x, FP8)
    want_values, want_scale = formats.quantise_fp8(x, FP8)
    assert torch.equal(scale, want_scale) and torch.equal(values.float(), want_values.float())


@pytest.mark.parametrize("features", [128, 300, 1152])
def test_quantise_per_group(features: int) -> None:
    x = _exact(3, features, 128)
    values, scale = quantise.per_group_fp8(x, FP8)
    want_values, want_scale = formats.quantise_fp8(x, FP8, 128)
    assert torch.equal(scale, want_scale) and torch.equal(values.float(), want_values.float())


def test_quantise_zeros() -> None:
    for values, scale in (
        quantise.per_token_fp8(torch.zeros(2, 128)),
        quantise.per_group_fp8(torch.zeros(2, 128)),
    ):
        assert not values.float().any() and (scale > 0).all()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("tokens", "features", "outputs", "splits"), [(1, 384, 70, 1), (5, 640, 130, 3), (70, 256, 200, None)]
)
def test_block_scaled_gemm(tokens: int, features: int, outputs: int, splits: int | None, bias: bool) -> None:
    x, x_scale = formats.quantise_fp8(torch.randn(tokens, features), FP8, 128)
    weight, weight_scale = formats.quantise_blocks(torch.randn(outputs, features), FP8)
    offset = torch.randn(outputs) if bias else None
    want = F.linear(formats.spread_groups(x, x_scale), formats.spread_blocks(weight, weight_scale), offset)
    got = gemm_fp8.block_scaled_gemm(x, x_scale, weight, weight_scale, offset, torch.float32, splits)
    torch.testing.assert_close(got, want, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize(
    ("tokens", "features", "outputs", "splits"), [(1, 384, 70, 1), (5, 640, 130, 3), (16, 200, 90, None)]
)
def test_few_rows_meet_float8_weights_as_they_are(
    tokens: int, features: int, outputs: int, splits: int | None, blocks: bool, dtype: torch.dtype
) -> None:
    x = (torch.randn(tokens, features) / 8).to(dtype)
    quantise = formats.quantise_blocks if blocks else formats.quantise_fp8
    weight, scale = quantise(torch.randn(outputs, features), FP8)
    wide = formats.spread_blocks(weight, scale) if blocks else weight.float() * scale[:, None]
    for bias in (None, torch.randn(outputs).to(dtype)):
        want = F.linear(x.float(), wide, None if bias is None else bias.float())
        torch.testing.assert_close(
            gemm_fp8.few_rows_gemm(x, weight, scale, bias, splits).float(), want, atol=8e-3, rtol=8e-3
        )


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("features", [128, 300, 1152])
def test_a_norm_that_writes_float8_is_the_norm_and_then_float8(features: int, grouped: bool) -> None:
    x, residual = torch.randn(3, features), torch.randn(3, features)
    weight = torch.rand(features) + 0.5
    quantised = quantise.per_group_fp8 if grouped else quantise.per_token_fp8
    for other in (None, residual):
        values, scale, total = norm.rms_norm_fp8(x, other, weight, 1e-6, FP8, grouped=grouped)
        if other is None:
            want, summed = norm.rms_norm(x, weight, 1e-6), x
        else:
            want, summed = norm.add_rms_norm(x, other, weight, 1e-6)
        want_values, want_scale = quantised(want, FP8)
        assert torch.equal(total, summed)
        torch.testing.assert_close(scale, want_scale, atol=0, rtol=1e-6)
        # A sum in another order may move a number over the edge between two of float8's.
        assert (values.float() != want_values.float()).float().mean() < 0.01


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize(("tokens", "group", "splits"), [(1, 32, 1), (7, 64, 3), (20, 128, None)])
def test_int4_gemm(tokens: int, group: int, splits: int | None, zeros: bool, dtype: torch.dtype) -> None:
    features, outputs = 256, 37
    x = torch.randn(tokens, features).to(dtype)
    nibbles = torch.randint(0, 16, (outputs, features))
    scale = torch.rand(outputs, features // group) / 40 + 0.001
    zero = torch.randint(0, 16, scale.shape).float() if zeros else None
    origin = zero if zero is not None else torch.full_like(scale, 8.0)
    wide = (nibbles - origin.repeat_interleave(group, 1)) * scale.repeat_interleave(group, 1)
    packed = gemm_int.pack_int4(nibbles, group)
    assert packed.shape == (outputs, features // 2)
    assert_close(gemm_int.int4_gemm(x, packed, scale, zero, None, splits), F.linear(x.float(), wide), dtype)


def test_int4_refuses_odd_groups() -> None:
    with pytest.raises(ValueError, match="groups of 48"):
        gemm_int.int4_gemm(torch.randn(1, 96), torch.zeros(4, 48, dtype=torch.uint8), torch.ones(4, 2))


@pytest.mark.parametrize("dtype", DTYPES)
def test_invariant_linear(dtype: torch.dtype) -> None:
    x, weight, bias = torch.randn(70, 150).to(dtype), (torch.randn(90, 150) / 12).to(dtype), torch.randn(90).to(dtype)
    together = invariant.product(x, weight, bias)
    assert_close(together, F.linear(x, weight, bias), dtype)
    assert_close(invariant.product(x, weight, None), F.linear(x, weight), dtype)
    for rows in (slice(0, 1), slice(3, 20), slice(64, 70)):
        apart = invariant.product(x[rows], weight, bias)
        if rows_are_alike():
            assert torch.equal(apart, together[rows])
        else:
            # Sums in another order may move a number over the edge between two of the type's.
            torch.testing.assert_close(apart, together[rows], atol=2e-6, rtol=max(1e-5, torch.finfo(dtype).eps))


def rows_are_alike() -> bool:
    """Whether numpy, which the interpreter multiplies with, gives a row the same bits wherever it stands in a block."""
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((64, 64), np.float32), rng.standard_normal((64, 64), np.float32)
    whole = a @ b
    return all(np.array_equal(np.roll(a, step, 0) @ b, np.roll(whole, step, 0)) for step in range(1, 16))


@pytest.mark.parametrize("dtype", DTYPES)
def test_lora(dtype: torch.dtype) -> None:
    torch.manual_seed(11)
    x, y = torch.randn(40, 100).to(dtype), torch.randn(40, 70).to(dtype)
    down, up = (torch.randn(4, 2, 8, 100) / 10).to(dtype), torch.randn(4, 8, 70).to(dtype)
    index = torch.tensor([3, *[0] * 3, *[1, 2] * 9, *[2] * 17, 0]).int()
    facts = torch.tensor([[0, 0], [8, 0], [8, 1], [8, 0]]).int()
    factor, shift = torch.rand(4, 70) + 0.5, torch.randn(4, 70)
    adapters = Adapters(index, facts, down, up, factor, shift, torch.tensor([30, 70]))
    want = ref.add_adapters(y, x, adapters)
    before = y.clone()
    y = lora.add_adapters(y, x, adapters)
    torch.testing.assert_close(y.float(), want.float(), atol=1e-4 if dtype == torch.float32 else 2e-2, rtol=1e-2)
    assert torch.equal(y[1:4], before[1:4]) and torch.equal(y[39], before[39])
