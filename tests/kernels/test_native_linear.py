"""Linear layers over packed weights: every type, shape, instruction set and thread count, against float64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_cases import (
    GGUF_TYPES,
    Source,
    as_int8,
    cases,
    levels,
    make_source,
    meets_bytes,
    needs_native,
    shared_inputs,
)

from phloem.core.errors import ConfigError
from phloem.kernels import native
from phloem.kernels import reference as ref
from phloem.kernels.calls import Norm
from phloem.kernels.native_linear import NativeLinear, PackedLinear
from phloem.platforms.cpu import Platform

pytestmark = needs_native
CPU = torch.device("cpu")
CASES = cases(1, 2)


@pytest.fixture(params=CASES)
def linear(request: Any) -> Iterator[NativeLinear]:
    level, threads = request.param
    native.table(threads, level)
    yield NativeLinear(native.runtime(), exact=True)
    native.runtime().library.set_level(None)


def pack(linear: NativeLinear, *sources: Source, dtype: torch.dtype = torch.bfloat16) -> PackedLinear:
    return linear.prepare_linear(list(sources), dtype, CPU)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def check(got: torch.Tensor, x: torch.Tensor, w: torch.Tensor, tolerance: float = 2e-6) -> None:
    """`got` is x w^T, up to rounding of float32 sums: measured against the sum of absolute products."""
    want, size = x.double() @ w.double().T, x.double().abs() @ w.double().abs().T
    assert got.dtype == torch.float32 and got.shape == want.shape
    error = (got.double() - want).abs() / size.clamp_min(1e-9)
    assert error.max() < tolerance, f"relative error {error.max():.2e}"


def multiplied_by(linear: NativeLinear, weight: PackedLinear, rows: int) -> torch.Tensor:
    """The values `[M, N]` that so many rows are multiplied by. Powers of two are quantised without an error."""
    n = weight.in_features
    ones = torch.eye(n).repeat(-(-(n + rows) // n), 1)
    return torch.cat([linear.linear(ones[at : at + rows], weight, None)[0] for at in range(0, n, rows)])[:n].T


@pytest.mark.parametrize("kind", GGUF_TYPES)
@pytest.mark.parametrize("rows", [25, 50, 131])
def test_many_rows_meet_bytes(kind: str, rows: int) -> None:
    """Weights of many rows are within half a step of the true ones."""
    table = native.table(2)
    linear = NativeLinear(native.runtime())
    source = make_source(kind, 40, 2 if kind.endswith("_K") else 11, seed=rows)
    weight = pack(linear, source)
    want, got = source.dense(torch.float32), multiplied_by(linear, weight, rows)
    if not meets_bytes(rows, exact=False):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)
        return
    assert table.name == "native"
    # Half a step of what the scales allow for, which these random numbers may not reach.
    shared = 64 if kind in ("Q2_K", "Q3_K") else 128  # inputs that have one scale
    pad = (0, -want.shape[1] % shared)
    want_BN, got_BN = (torch.nn.functional.pad(w, pad).reshape(-1, shared) for w in (want, got))
    step = want_BN.abs().amax(1, keepdim=True) / 127
    assert ((got_BN - want_BN).abs() < (1.1 if kind.endswith("_K") else 0.75) * step).all()
    x = random(rows, source.shape[1], seed=rows + 1)  # nothing so near to a half that it rounds either way
    check(linear.linear(x, weight, None)[0], as_int8(x, shared_inputs(kind, rows, exact=False)), got, 3e-6)


@pytest.mark.parametrize("other", ["Q3_K", "Q8_0", "Q6_K", "dense"])
def test_parts_of_one_layer_share_their_activations(other: str) -> None:
    """A part that does not bear a scale for 64 inputs keeps the whole layer from it."""
    native.table(2)
    linear = NativeLinear(native.runtime())
    rows, columns = 40, 512
    lone = make_source("Q4_0", 32, columns // 32, seed=1)
    blocks = columns // (256 if other.endswith("_K") else 32)
    beside = (
        Source.dense_of(random(32, columns, seed=2)) if other == "dense" else make_source(other, 32, blocks, seed=2)
    )
    x = random(rows, columns, seed=3)
    weight = pack(linear, lone, beside)
    values = multiplied_by(linear, weight, rows)[:32]
    kind = other if other in ("Q3_K", "Q8_0") else "Q4_0"
    check(linear.linear(x, weight, None)[0][:, :32], as_int8(x, shared_inputs(kind, rows, exact=False)), values, 3e-6)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "dense"])
def test_no_rows(linear: NativeLinear, kind: str) -> None:
    weight = pack(linear, Source.dense_of(random(20, 64)) if kind == "dense" else make_source(kind, 20, 2, seed=1))
    nothing = torch.empty(0, 64)
    out, total = linear.fused(nothing, weight, addend=nothing, norm=Norm(torch.ones(64), 1e-6))
    assert out.shape == (0, 20) and total is not None and total.shape == (0, 64)
    assert linear.linear_argmax(nothing, weight).shape == (0,)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_a_feature_of_zeros_stays_zero(kind: str) -> None:
    native.table(2)
    linear = NativeLinear(native.runtime())
    source = make_source(kind, 20, 2, seed=1)
    source.data[3] = 0
    got = linear.linear(random(40, 64), pack(linear, source), None)[0]
    assert (got[:, 3] == 0).all() and got.isfinite().all() and (got[:, 4] != 0).any()


@pytest.mark.parametrize("kind", GGUF_TYPES)
@pytest.mark.parametrize("rows", [1, 3, 13, 50])
def test_matmul(linear: NativeLinear, kind: str, rows: int) -> None:
    source = make_source(kind, 40, 2 if kind.endswith("_K") else 5, seed=rows)
    weight = pack(linear, source)
    x = random(rows, source.shape[1], seed=rows)
    got = linear.linear(x, weight, None)[0]
    check(got, as_int8(x), source.dense(torch.float32))
    want = x @ source.dense(torch.float32).T
    # Uniformly random integers make sums as long as their terms' norm: the int8 error is seen at its worst.
    assert (got - want).norm() < 1e-2 * want.norm()


@pytest.mark.parametrize("dtype,tolerance", [(torch.bfloat16, 2e-6), (torch.float16, 2e-6), (torch.float32, 2e-6)])
@pytest.mark.parametrize("rows,columns", [(1, 48), (2, 33), (7, 200), (30, 576)])
def test_dense(linear: NativeLinear, dtype: torch.dtype, tolerance: float, rows: int, columns: int) -> None:
    tensor = random(75, columns, seed=1).to(dtype)
    x = random(rows, columns, seed=2)
    got = linear.linear(x, pack(linear, Source.dense_of(tensor), dtype=dtype), None)[0]
    check(got, x.bfloat16() if dtype == torch.bfloat16 else x, tensor, tolerance)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.sampled_from([1, 2, 5, 6, 8, 9, 12, 14, 31, 64, 100]),
    outputs=st.integers(1, 100),
    blocks=st.integers(1, 20),
    kind=st.sampled_from(["Q4_1", "Q8_0", "Q5_0", "dense"]),
    level=st.sampled_from(levels() or [None]),
    threads=st.integers(1, 3),
    exact=st.booleans(),
)
def test_any_shape(rows: int, outputs: int, blocks: int, kind: str, level: str, threads: int, exact: bool) -> None:
    native.table(threads, level)
    try:
        linear = NativeLinear(native.runtime(), exact=exact)
        source = make_source(kind, outputs, blocks, seed=outputs)
        x, bias = random(rows, 32 * blocks, seed=rows), random(outputs)
        weight = pack(linear, source)
        got = linear.linear(x, weight, bias)[0]
        values = source.dense(torch.float32) if exact else multiplied_by(linear, weight, rows)
        taken = x.bfloat16() if kind == "dense" else as_int8(x, shared_inputs(kind, rows, exact))
        check(got - bias, taken, values, 1e-4)
    finally:
        native.table(2, None)


@pytest.mark.parametrize("kind", ["Q4_1", "Q6_K", "Q8_0", "dense"])
def test_a_row_does_not_depend_on_its_company(kind: str) -> None:
    """Bit for bit: any number of rows, threads and panels give the result of the row alone."""
    source = make_source(kind, 80, 10 if kind[-1] != "K" else 3, seed=4)
    x = random(600, source.shape[1], seed=9)
    x[3] = 0
    results = []
    for threads in (1, 2):
        native.table(threads)
        linear = NativeLinear(native.runtime(), exact=True)
        weight = pack(linear, source)
        results += [linear.linear(x[:rows], weight, None)[0] for rows in (1, 4, 8, 9, 40, 300, 600)]
        results.append(torch.cat([linear.linear(row[None], weight, None)[0] for row in x[:50]]))
    for result in results:
        assert torch.equal(result, results[6][: len(result)])
    assert not results[0].isnan().any()


@pytest.mark.parametrize("level", levels())
def test_levels_agree(level: str) -> None:
    """The integer sums are exact, so that instruction sets differ in the rounding of float sums alone."""
    source, x = make_source("Q4_K", 33, 4, seed=2), random(11, 1024)
    results = []
    for name in (level, None):
        native.table(2, name)
        linear = NativeLinear(native.runtime(), exact=True)
        results.append(linear.linear(x, pack(linear, source), None)[0])
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 7, 40])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gated(linear: NativeLinear, rows: int, activation: str) -> None:
    gate, up = make_source("Q4_1", 64, 3, seed=1), make_source("Q4_1", 64, 3, seed=2)
    weight = pack(linear, gate, up)
    x = random(rows, 96)
    both = linear.linear(x, weight, None)[0]
    check(both, as_int8(x), torch.cat([gate.dense(torch.float32), up.dense(torch.float32)]))
    got, _ = linear.fused(x, weight, activation=activation)
    want = ref.silu_and_mul(both) if activation == "silu" else ref.gelu_tanh_and_mul(both)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rows,columns", [(1, 96), (5, 96), (40, 96), (3, 70)])
def test_norm_before_and_residual_after(linear: NativeLinear, rows: int, columns: int) -> None:
    source = Source.dense_of(random(30, columns, seed=5))
    weight = pack(linear, source, dtype=torch.float32)
    x, addend, norm, residual = random(rows, columns), random(rows, columns, seed=1), random(columns), random(rows, 30)
    got, total = linear.fused(x, weight, addend=addend, norm=Norm(norm, 1e-5), residual=residual)
    normed, want_total = ref.add_rms_norm(x, addend, norm, 1e-5)
    assert torch.equal(total, want_total)
    torch.testing.assert_close(got, normed @ source.dense(torch.float32).T + residual, rtol=1e-4, atol=1e-4)
    again, nothing = linear.fused(x, weight, norm=Norm(norm, 1e-5))
    torch.testing.assert_close(again, ref.rms_norm(x, norm, 1e-5) @ source.dense(torch.float32).T, rtol=1e-4, atol=1e-4)
    assert nothing is None


@pytest.mark.parametrize("rows", [1, 5, 70])
@pytest.mark.parametrize("kind", ["Q8_0", "dense"])
def test_argmax(linear: NativeLinear, rows: int, kind: str) -> None:
    source = make_source(kind, 1003, 2, seed=8)
    weight = pack(linear, source)
    x = random(rows, 64)
    assert torch.equal(linear.linear_argmax(x, weight), linear.linear(x, weight, None)[0].argmax(-1).int())
    ties = torch.zeros(rows, 64)
    assert linear.linear_argmax(ties, weight).tolist() == [0] * rows


def test_mixed_parts_and_views(linear: NativeLinear) -> None:
    sources = [make_source("Q4_K", 48, 1, 1), make_source("Q6_K", 24, 1, 2), make_source("dense", 24, 8, 3)]
    weight = pack(linear, *sources)
    wide = random(6, 600)
    x = wide[:, 44:300]
    got, w = linear.linear(x, weight, None)[0], torch.cat([source.dense(torch.float32) for source in sources])
    check(got[:, :72], as_int8(x), w[:72])
    check(got[:, 72:], x.bfloat16(), w[72:])
    assert torch.equal(linear.linear(x.view(2, 3, 256), weight, None)[0], got.view(2, 3, 96))


@pytest.mark.parametrize("kind", ["Q4_1", "Q4_0", "dense"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_a_number_stays_so(linear: NativeLinear, kind: str, bad: float) -> None:
    weight = pack(linear, make_source(kind, 20, 4, 1))
    x = random(3, 128)
    x[1, 77] = bad
    got = linear.linear(x, weight, None)[0]
    assert not got[1].isfinite().any()
    assert got[[0, 2]].isfinite().all()


@pytest.mark.parametrize("kinds", [("Q4_1", "Q4_1"), ("Q4_1", "Q5_1")])
def test_gated_linear_of_any_parts(linear: NativeLinear, kinds: tuple[str, str]) -> None:
    weight = pack(linear, *(make_source(kind, 32, 2, i) for i, kind in enumerate(kinds)))
    x, bias = random(3, 64), random(64, seed=4)
    want = ref.silu_and_mul(linear.linear(x, weight, bias)[0])
    torch.testing.assert_close(linear.linear(x, weight, bias, gate="silu")[0], want, rtol=1e-5, atol=1e-5)


def test_wrong_inputs_are_refused(linear: NativeLinear) -> None:
    weight = pack(linear, make_source("Q4_1", 16, 2, 1), make_source("Q4_0", 16, 2, 1))
    with pytest.raises(ValueError, match="64 inputs, not 32"):
        linear.linear(random(1, 32), weight, None)[0]
    with pytest.raises(ValueError, match="two equal parts"):
        linear.fused(random(1, 64), weight, activation="silu")
    with pytest.raises(TypeError, match="float32"):
        linear.linear(random(1, 64).bfloat16(), weight, None)[0]


def test_recorded_step_repeats(linear: NativeLinear) -> None:
    """A recorded layer gives what an eager one gives, also when the pool has become larger since."""
    rt = native.runtime()
    embed = pack(linear, make_source("Q8_0", 10, 3, 6))
    up = pack(linear, make_source("Q4_1", 64, 3, 1), make_source("Q4_1", 64, 3, 3))
    back = pack(linear, make_source("Q8_0", 40, 2, 2))
    ids, bias = torch.tensor([3, 5]), random(40).bfloat16()

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        hidden, _ = linear.fused(linear.embedding(ids, embed, 1.0), up, activation="silu")
        return linear.linear(hidden, back, bias)[0], linear.linear_argmax(hidden, back)

    graph, (out, token) = native.Recorder(rt).record(step)
    rt.library.set_threads(3)
    ids.copy_(torch.tensor([9, 0]))
    graph.replay()
    want, want_token = step()
    assert torch.equal(out, want) and torch.equal(token, want_token)


def test_the_invariant_table_by_name() -> None:
    table, reason = Platform(2).table("invariant")
    assert table.name == "invariant" and "batch-invariant" in reason
    weight = table.prepare_linear([make_source("Q4_0", 48, 3, seed=1)], torch.bfloat16, CPU)
    x = random(70, 96)
    assert torch.equal(table.linear(x, weight, None)[0][:1], table.linear(x[:1], weight, None)[0])
    with pytest.raises(ConfigError, match="not one of reference, native, invariant"):
        Platform(2).table("fastest")
