"""The native table against the reference: odd shapes, tails, views, every instruction set here, one and two threads."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import int8_pages
import pytest
import torch
from linear_cases import cases, needs_native

from phloem.attention._store import store
from phloem.kernels import native
from phloem.kernels import reference as ref
from phloem.kernels import reference_models as ref_models
from phloem.kernels.ops import Ops, Rotation
from phloem.layers.context import AttentionSpec, Heads

pytestmark = needs_native
CASES = cases(1, 2)


@pytest.fixture(params=CASES)
def ops(request: Any) -> Iterator[Ops]:
    level, threads = request.param
    yield native.table(threads, level)
    native.runtime().library.set_level(None)


def close(got: torch.Tensor, want: torch.Tensor, tolerance: float = 2e-6) -> None:
    assert got.shape == want.shape and got.dtype == want.dtype
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


SHAPES = [(1, 1), (1, 7), (1, 16), (1, 577), (1, 9001), (3, 33), (5, 64), (37, 576), (130, 100)]


@pytest.mark.parametrize("rows,n", SHAPES)
def test_elementwise(ops: Ops, rows: int, n: int) -> None:
    torch.manual_seed(rows * n)
    wide = torch.randn(rows, 2 * n + 3) * 4
    x, y = wide[:, :n], torch.randn(rows, n)
    close(ops.add(x, y), ref.add(x, y), 0)
    close(ops.softcap(x, 3.0), ref.softcap(x, 3.0))
    close(ops.silu_and_mul(wide[:, : 2 * n]), ref.silu_and_mul(wide[:, : 2 * n]), 4e-6)
    close(ops.gelu_tanh_and_mul(wide[:, : 2 * n]), ref.gelu_tanh_and_mul(wide[:, : 2 * n]), 4e-6)
    close(ops.gelu(x), ref_models.gelu(x), 2e-6)
    for kind in (torch.int64, torch.int32):
        index = torch.randint(0, rows, (rows + 2,)).to(kind)
        close(ops.select_rows(x, index), ref.select_rows(x, index), 0)


def test_elementwise_extremes(ops: Ops) -> None:
    x = torch.tensor([[-200.0, -88.0, -1e-20, 0.0, 1e-20, 88.0, 200.0, 3e38] * 3])
    x = torch.cat((x, torch.ones_like(x)), -1)
    close(ops.silu_and_mul(x), ref.silu_and_mul(x))
    close(ops.gelu_tanh_and_mul(x[:, :23].repeat(1, 2)), ref.gelu_tanh_and_mul(x[:, :23].repeat(1, 2)), 1e-5)
    finite = x.clamp(max=1e38)  # torch doubles first on some processors
    close(ops.gelu(finite), ref_models.gelu(finite))
    close(ops.softcap(x, 50.0), ref.softcap(x, 50.0))
    nan = torch.tensor([[float("nan"), 1.0]])
    assert ops.silu_and_mul(nan).isnan().all()


@pytest.mark.parametrize("rows,n", SHAPES)
def test_norms(ops: Ops, rows: int, n: int) -> None:
    torch.manual_seed(rows + n)
    x, y, weight = torch.randn(rows, n + 5)[:, :n], torch.randn(rows, n + 1)[:, 1:], torch.randn(n)
    close(ops.rms_norm(x, weight, 1e-5), ref.rms_norm(x, weight, 1e-5), 4e-6)
    for got, want in zip(ops.add_rms_norm(x, y, weight, 1e-6), ref.add_rms_norm(x, y, weight, 1e-6), strict=True):
        close(got, want, 4e-6)
    heads = torch.randn(rows, 3 * n + 4)[:, : 3 * n].unflatten(-1, (3, n))
    close(ops.rms_norm(heads, weight, 1e-5), ref.rms_norm(heads, weight, 1e-5), 4e-6)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("tokens,heads,kv_heads,size,rotary", [(1, 9, 3, 64, 64), (5, 4, 1, 80, 32), (70, 3, 3, 6, 6)])
def test_rope(ops: Ops, interleaved: bool, tokens: int, heads: int, kv_heads: int, size: int, rotary: int) -> None:
    torch.manual_seed(tokens)
    fused = torch.randn(tokens, (heads + 2 * kv_heads) * size)
    cos_sin = torch.randn(50, 2, rotary // 2)
    positions = torch.randint(0, 50, (tokens,))
    for kind in (torch.int64, torch.int32):
        got, want = fused.clone(), fused.clone()
        for table, x in ((ops.rope_, got), (ref.rope_, want)):
            q = x[:, : heads * size].unflatten(-1, (heads, size))
            k = x[:, heads * size : (heads + kv_heads) * size].unflatten(-1, (kv_heads, size))
            table(q, k, positions.to(kind), cos_sin, interleaved)
        close(got, want)


@pytest.mark.parametrize("tokens,kv_heads,size,page_size", [(1, 3, 64, 16), (40, 1, 80, 4), (17, 2, 12, 24)])
def test_write_kv(ops: Ops, tokens: int, kv_heads: int, size: int, page_size: int) -> None:
    torch.manual_seed(tokens)
    k, v = torch.randn(tokens, 2, kv_heads, size).unbind(1)
    k[0] = 0
    pages = -(-tokens // page_size) + 3
    slots = torch.randperm(pages * page_size)[:tokens].to(torch.int32)
    got = [torch.zeros(pages, kv_heads, page_size, size, dtype=torch.bfloat16) for _ in "kv"]
    want = [cache.clone() for cache in got]
    ops.write_kv(k, v, *got, slots)
    ref.write_kv(k, v, *want, slots)
    assert all(torch.equal(*pair) for pair in zip(got, want, strict=True))
    wide, whole = ([torch.zeros(pages, kv_heads, page_size, size) for _ in "kv"] for _ in range(2))
    ref.write_kv(k, v, *wide, slots)
    ops.write_kv(k, v, *whole, slots)
    assert all(torch.equal(*pair) for pair in zip(whole, wide, strict=True))
    both = torch.zeros(pages, 2, kv_heads, page_size, size + 4, dtype=torch.int8)
    ops.write_kv(k, v, both[:, 0], both[:, 1], slots)
    for cache, exact, keys in zip(both.unbind(1), wide, (True, False), strict=True):
        step = exact.abs().amax(-1, keepdim=True) / 127
        assert ((int8_pages.unpack(cache, keys) - exact).abs() <= step * 0.5001).all()


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.int8, torch.float32])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    "tokens,heads,kv_heads,size,rotary",
    [(1, 9, 3, 64, 64), (33, 9, 3, 64, 64), (7, 4, 1, 80, 32), (41, 3, 3, 8, 6), (5, 4, 2, 52, 50)],
)
def test_rope_and_write_in_one_gives_the_same_bits(
    ops: Ops, kind: torch.dtype, normed: bool, interleaved: bool, tokens: int, heads: int, kv_heads: int, size: int,
    rotary: int,
) -> None:  # fmt: skip
    torch.manual_seed(tokens)
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * size + 3)
    norms = (torch.rand(size) + 0.5, torch.rand(size) + 0.5, 1e-6) if normed else (None, None, 0.0)
    turn = Rotation(torch.randint(0, 50, (tokens,)), torch.randn(50, 2, rotary // 2), interleaved, *norms)
    pages = -(-tokens // 4) + 3
    slots = torch.randperm(pages * 4)[:tokens].to(torch.int32)
    shape = (pages, kv_heads, 4, size + 4 * (kind == torch.int8))
    seen = []
    for table in (ops, dataclasses.replace(ops, rope_write_kv=None)):
        x = qkv.clone()
        q, k, v = x[:, :-3].unflatten(-1, (heads + 2 * kv_heads, size)).split((heads, kv_heads, kv_heads), 1)
        caches = [torch.zeros(shape, dtype=kind) for _ in "kv"]
        spec = AttentionSpec(0, heads, kv_heads, size, 1.0)
        seen.append([store(table, spec, Heads(q, k, v, None, turn), (caches[0], caches[1]), slots), *caches])
        assert torch.equal(x[:, -3:], qkv[:, -3:])
    assert all(torch.equal(*pair) for pair in zip(*seen, strict=True))
    assert not torch.equal(seen[0][0], qkv[:, : heads * size].unflatten(-1, (heads, size)))


def test_rope_and_write_refuses_what_does_not_fit(ops: Ops) -> None:
    q, cache, slots = torch.randn(2, 2, 8), torch.zeros(2, 2, 4, 8, dtype=torch.bfloat16), torch.tensor([0, 1]).int()
    turn = Rotation(torch.arange(2), torch.ones(4, 2, 4))
    assert ops.rope_write_kv is not None
    with pytest.raises(ValueError, match=r"values .* do not fit the keys"):
        ops.rope_write_kv(q, q, q[:1], turn, cache, cache, slots)
    with pytest.raises(ValueError, match="do not fit the keys"):
        ops.rope_write_kv(q, q, q, turn, cache.half(), cache.half(), slots)
    with pytest.raises(ValueError, match="does not fit heads of 8"):
        ops.rope_write_kv(q, q, q, dataclasses.replace(turn, cos_sin=torch.ones(4, 2, 5)), cache, cache, slots)
    with pytest.raises(TypeError, match="norm weight"):
        norms = {"q_norm": torch.ones(8), "k_norm": torch.ones(7)}
        ops.rope_write_kv(q, q, q, dataclasses.replace(turn, **norms), cache, cache, slots)


def test_wrong_arguments_are_refused(ops: Ops) -> None:
    x = torch.randn(2, 8)
    with pytest.raises(TypeError, match="float32"):
        ops.add(x.bfloat16(), x.bfloat16())
    with pytest.raises(ValueError, match="cannot add"):
        ops.add(x, x[:, :4])
    with pytest.raises(TypeError, match="norm weight"):
        ops.rms_norm(x, torch.ones(4), 1e-5)
    with pytest.raises(ValueError, match="same number"):
        ops.silu_and_mul(x[:, :7])
    with pytest.raises(TypeError, match="indices"):
        ops.select_rows(x, torch.tensor([0.0]))
    with pytest.raises(ValueError, match="do not fit"):
        cache = torch.zeros(2, 1, 4, 8, dtype=torch.int8)
        ops.write_kv(x[:, None], x[:, None], cache, cache, torch.tensor([0, 1], dtype=torch.int32))
