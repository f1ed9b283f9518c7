"""Experts of any kind, and of weights of 4 bits, against plain torch, under the interpreter."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from triton_support import DTYPES, assert_close, filled_with_nan, need_interpreter

from phloem.kernels import reference_experts as ref
from phloem.kernels import reference_models as models
from phloem.kernels.specs import ExpertSpec

need_interpreter()
from phloem.kernels.triton import gemm_mxfp4, moe, nibbles, table, weights  # noqa: E402
from phloem.kernels.triton.gemm_int import pack_int4  # noqa: E402
from phloem.kernels.triton.weights import Form, Int4Experts, Mxfp4Weight, widened  # noqa: E402

Make = Callable[[int, int, torch.dtype], torch.Tensor | Form]
EXPERTS = 5
SPECS = [
    ExpertSpec(EXPERTS, "swiglu_clamp", limit=1.5, alpha=1.702),
    ExpertSpec(EXPERTS, "silu"),
    ExpertSpec(EXPERTS, "gelu_tanh", first=3),
    ExpertSpec(EXPERTS, "relu2", gated=False),
    ExpertSpec(EXPERTS, "silu", scale_input=True, first=2),
]


def plain(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    return (torch.randn(rows, columns) * columns**-0.5).to(dtype)


def int4(
    rows: int, columns: int, dtype: torch.dtype, count: int = EXPERTS, group: int = 32, zeros: bool = True
) -> Int4Experts:
    codes, shape = torch.randint(0, 16, (rows, columns)), (count, columns // group, rows // count)
    scale = (0.2 + torch.rand(shape)).half() / 8 / columns**0.5
    zero = (torch.rand(shape) * 15).half() if zeros else None
    return Int4Experts(pack_int4(codes, group), scale, zero, dtype)


def mxfp4(rows: int, columns: int, dtype: torch.dtype, count: int = EXPERTS) -> Mxfp4Weight:
    codes, shape = torch.randint(0, 16, (rows, columns)), (count, columns // 32, rows // count)
    return Mxfp4Weight(nibbles.pack_mxfp4(codes), torch.randint(121, 126, shape).byte(), dtype)


def int4_in_large_groups(rows: int, columns: int, dtype: torch.dtype) -> Int4Experts:
    return int4(rows, columns, dtype, group=min(128, columns), zeros=False)


MAKERS: dict[str, Make] = {"plain": plain, "int4": int4, "int4, large groups": int4_in_large_groups, "mxfp4": mxfp4}


def close(got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype) -> None:
    assert got.dtype == dtype and bool(got.isfinite().all())
    off = (got.float() - want.float()).norm() / want.float().norm().clamp_min(1e-6)
    assert off < {torch.float32: 2e-5, torch.float16: 4e-3}[dtype], float(off)


@pytest.mark.parametrize("biased", [False, True], ids=["", "biased"])
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.activation + (" weighed" if spec.scale_input else ""))
@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize(("tokens", "dtype"), [(0, DTYPES[0]), (1, DTYPES[0]), (3, DTYPES[1]), (7, DTYPES[1]),
                                               (33, DTYPES[0])])  # fmt: skip
@pytest.mark.some(16)
def test_experts_of_any_kind(tokens: int, dtype: torch.dtype, make: str, spec: ExpertSpec, biased: bool) -> None:
    """Ids of other ranks' experts, and -1, add nothing, whatever stood in memory; rows of x lie apart."""
    torch.manual_seed(tokens)
    features, inner = 96, 32
    if make == "int4, large groups":
        features, inner = 128, 64
    gate_up = MAKERS[make](EXPERTS * inner * (2 if spec.gated else 1), features, dtype)
    down = MAKERS[make](EXPERTS * features, inner, dtype)
    x, weight = torch.randn(tokens, features + 8).to(dtype)[:, :features], torch.rand(tokens, 3)
    ids = torch.stack([torch.randperm(9)[:3] for _ in range(tokens)] or [torch.zeros(3)])[:tokens].int() - 1
    biases = (torch.randn(gate_up.shape[0]), torch.randn(down.shape[0])) if biased else None
    with filled_with_nan():
        got = moe.experts_op(x, ids, weight, gate_up, down, spec, biases)
    wide = widened(gate_up).float(), widened(down).float()
    close(got, models.experts(x.float(), ids, weight, *wide, spec, biases), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("make", ["int4", "mxfp4"])
@pytest.mark.parametrize(("tokens", "renormalise"), [(0, True), (2, True), (9, False), (70, True)])
def test_plain_experts_of_4_bits_are_routed_and_computed(
    tokens: int, renormalise: bool, make: str, dtype: torch.dtype
) -> None:
    torch.manual_seed(tokens)
    gate_up, down = MAKERS[make](EXPERTS * 2 * 32, 64, dtype), MAKERS[make](EXPERTS * 64, 32, dtype)
    x, logits = torch.randn(tokens, 64).to(dtype), torch.randn(tokens, EXPERTS) * 2
    with filled_with_nan():
        got = moe.moe(x, logits, gate_up, down, 2, renormalise)
        ids, weight = (one.contiguous() for one in reversed(ref.route(logits, 2, renormalise)))
        apart = moe.chosen_experts(x, ids, weight, gate_up, down)
    wide = widened(gate_up).float(), widened(down).float()
    want = ref.moe(x.float(), logits, *wide, 2, renormalise)
    close(got, want, dtype)
    close(apart, want, dtype)


def test_one_product_may_be_narrow_and_the_other_not() -> None:
    """A share of the inner size that no group divides."""
    spec = ExpertSpec(3, "swiglu_clamp")
    gate_up, down = mxfp4(3 * 2 * 40, 64, torch.float32, 3), plain(3 * 64, 40, torch.float32)
    biases = torch.randn(3 * 80), torch.randn(3 * 64)
    for tokens in (2, 11):
        x, ids, weight = torch.randn(tokens, 64), torch.randint(3, (tokens, 2)).int(), torch.rand(tokens, 2)
        got = moe.experts_op(x, ids, weight, gate_up, down, spec, biases)
        close(got, models.experts(x, ids, weight, widened(gate_up), down, spec, biases), torch.float32)
        got = moe.chosen_experts(x, ids, weight, gate_up, down)
        close(got, ref.chosen_experts(x, ids, weight, widened(gate_up), down), torch.float32)


def test_what_is_no_number_stays_so() -> None:
    """The clamp of an activation hides no damage."""
    spec = ExpertSpec(2, "swiglu_clamp")
    gate_up, down = plain(2 * 2 * 32, 32, torch.float32), plain(2 * 32, 32, torch.float32)
    biases = torch.zeros(128), torch.zeros(64)
    for tokens in (2, 6):
        x = torch.randn(tokens, 32)
        x[1, 3] = float("nan")
        got = moe.experts_op(x, torch.zeros(tokens, 1).int(), torch.ones(tokens, 1), gate_up, down, spec, biases)
        assert bool(got[1].isnan().all()) and bool(got[0].isfinite().all())


def test_every_4_bit_float_and_scale_is_exact() -> None:
    """All codes, and exponents over the range of weights."""
    exponents = torch.tensor([0, 1, 60, 100, 127, 128, 160, 186]).byte()
    codes = torch.arange(16).repeat(8, 2)
    weight = Mxfp4Weight(nibbles.pack_mxfp4(codes), exponents[None, None], torch.float32)
    want = torch.tensor(nibbles.E2M1)[codes].double() * 2.0 ** (exponents.double() - 127)[:, None]
    assert torch.equal(widened(weight).double(), want)
    got = gemm_mxfp4.mxfp4_gemm(torch.eye(32), weight.packed, weight.scale)
    assert torch.equal(got.double(), want.T)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("splits", [None, 1, 3])
@pytest.mark.parametrize(("tokens", "columns", "outputs"), [(0, 64, 40), (1, 288, 70), (20, 160, 33), (70, 320, 24)])
def test_dense_products_of_4_bit_floats(
    tokens: int, columns: int, outputs: int, splits: int | None, dtype: torch.dtype
) -> None:
    torch.manual_seed(tokens)
    weight, x = mxfp4(outputs, columns, dtype, 1), torch.randn(tokens, columns + 3).to(dtype)[:, :columns]
    for bias in (None, torch.randn(outputs).to(dtype)):
        got = gemm_mxfp4.mxfp4_gemm(x, weight.packed, weight.scale, bias, splits)
        want = torch.nn.functional.linear(x.float(), widened(weight).float(), None if bias is None else bias.float())
        close(got, want, dtype)
    assert_close(weights.product(x, weight, None), gemm_mxfp4.mxfp4_gemm(x, weight.packed, weight.scale), dtype)


def test_rows_are_read_of_4_bit_floats() -> None:
    weight = mxfp4(6, 64, torch.float32, 2)
    rows = table.table().embedding(torch.tensor([4, 0]), weight, 1.0)
    assert torch.equal(rows, widened(weight)[[4, 0]]) and weight.shape == (6, 64)
