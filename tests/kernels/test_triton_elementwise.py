"""Norms, activations, RoPE, KV write, rows and pages against plain torch, under the interpreter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from triton_support import DTYPES, assert_close, need_interpreter

from phloem.attention._store import store
from phloem.kernels import reference as ref
from phloem.kernels.ops import Rotation
from phloem.layers.context import AttentionSpec, Heads

need_interpreter()
from phloem.engine import transfer  # noqa: E402
from phloem.kernels.triton import activation, norm, pages, rope, table, tokens  # noqa: E402


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 7), (5, 300), (3, 4, 24), (2, 1030)])
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight = torch.randn(shape).to(dtype), torch.randn(shape[-1]).to(dtype)
    assert_close(norm.rms_norm(x, weight, 1e-6), ref.rms_norm(x, weight, 1e-6), dtype)


@pytest.mark.parametrize("count", [1, 5, 128, 300])
def test_the_tokens_that_a_step_begins_and_ends_with(count: int) -> None:
    last, slots = torch.arange(1000, 1000 + 512), torch.randperm(512)[:count]
    ids = torch.randint(0, 500, (count,))
    ids[::2] = -1
    got, want = ids.clone(), ids.clone()
    tokens.late_tokens_(got, last, slots)
    transfer.late_tokens_(want, last, slots)
    assert torch.equal(got, want) and int(got[0]) == 1000 + int(slots[0])
    for kind in (torch.int32, torch.int64):
        chosen, sound = torch.randint(0, 9000, (count,)).to(kind), torch.randn(count)
        sound[1::3] = float("nan")
        mine, theirs = last.clone(), last.clone()
        packed = tokens.keep_tokens_(mine, slots, chosen, sound)
        assert packed.dtype == torch.int32
        assert torch.equal(packed, transfer.keep_tokens_(theirs, slots, chosen, sound))
        assert torch.equal(mine, theirs) and torch.equal(mine[slots], chosen.long())
    assert tokens.keep_tokens_(last, slots[:0], ids[:0], torch.zeros(0)).shape == (0,)


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_reads_strided_views(dtype: torch.dtype) -> None:
    fused = torch.randn(6, 100).to(dtype)
    heads, weight = fused[:, 10:58].unflatten(1, (3, 16)), torch.randn(16).to(dtype)
    assert_close(norm.rms_norm(heads, weight, 1e-5), ref.rms_norm(heads, weight, 1e-5), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_add_rms_norm(dtype: torch.dtype) -> None:
    x, residual, weight = (torch.randn(*shape).to(dtype) for shape in ((5, 130), (5, 130), (130,)))
    got, want = norm.add_rms_norm(x, residual, weight, 1e-6), ref.add_rms_norm(x, residual, weight, 1e-6)
    assert torch.equal(got[1], want[1])
    assert_close(got[0], want[0], dtype)


def test_norm_of_a_row_does_not_depend_on_the_batch() -> None:
    x, weight = torch.randn(9, 77), torch.randn(77)
    together = norm.rms_norm(x, weight, 1e-6)
    assert all(torch.equal(norm.rms_norm(x[i : i + 1], weight, 1e-6)[0], together[i]) for i in range(9))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["silu_and_mul", "gelu_tanh_and_mul"])
def test_gated(name: str, dtype: torch.dtype) -> None:
    x = (3 * torch.randn(4, 2 * 1100)).to(dtype)
    assert_close(getattr(activation, name)(x), getattr(ref, name)(x), dtype)
    # Large inputs saturate; they must not overflow.
    large = torch.tensor([[-90.0, 90.0, 1.0, 2.0]]).to(dtype)
    assert_close(getattr(activation, name)(large), getattr(ref, name)(large), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_add_and_softcap(dtype: torch.dtype) -> None:
    x, y = (5 * torch.randn(3, 1050)).to(dtype), torch.randn(3, 2000).to(dtype)[:, 30:1080]
    assert_close(activation.add(x, y), x + y, dtype)
    assert_close(activation.softcap(x, 2.5), ref.softcap(x, 2.5), dtype)
    assert_close(activation.softcap(x * 20, 30.0), ref.softcap(x * 20, 30.0), dtype)


def _rope_case(dtype: torch.dtype, heads: int, kv_heads: int, head: int, rotary: int) -> tuple:
    fused = torch.randn(5, (heads + 2 * kv_heads) * head).to(dtype)
    q, k, v = fused.split([heads * head, kv_heads * head, kv_heads * head], 1)
    angles = torch.rand(40, rotary // 2) * 6
    cos_sin = torch.stack((angles.cos(), angles.sin()), 1).contiguous()
    positions = torch.tensor([0, 39, 7, 8, 30])
    return (
        fused,
        q.unflatten(1, (heads, head)),
        k.unflatten(1, (kv_heads, head)),
        v.unflatten(1, (kv_heads, head)),
        positions,
        cos_sin,
    )


CASES = [(4, 2, 16, 16, False), (3, 1, 24, 24, True), (9, 3, 32, 16, False), (2, 2, 20, 12, True)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_rope_in_place(case: tuple, dtype: torch.dtype) -> None:
    *shape, interleaved = case
    fused, q, k, _, positions, cos_sin = _rope_case(dtype, *shape)
    want_q, want_k, before = q.clone(), k.clone(), fused.clone()
    ref.rope_(want_q, want_k, positions, cos_sin, interleaved)
    rope.rope_(q, k, positions, cos_sin, interleaved)
    assert_close(q, want_q, dtype)
    assert_close(k, want_k, dtype)
    assert torch.equal(fused[:, (shape[0] + shape[1]) * shape[2] :], before[:, (shape[0] + shape[1]) * shape[2] :])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_rope_and_write_in_one(case: tuple, dtype: torch.dtype) -> None:
    *shape, interleaved = case
    _, q, k, v, positions, cos_sin = _rope_case(dtype, *shape)
    caches = [torch.zeros(4, shape[1], 8, shape[2], dtype=dtype) for _ in range(4)]
    slots = torch.tensor([9, 31, 10, 16, 3]).int()
    want_q, want_k, unrotated = q.clone(), k.clone(), k.clone()
    ref.rope_(want_q, want_k, positions, cos_sin, interleaved)
    ref.write_kv(want_k, v, caches[0], caches[1], slots)
    turned = rope.rope_write_kv(q, k, v, Rotation(positions, cos_sin, interleaved), caches[2], caches[3], slots)
    assert_close(turned, want_q, dtype)
    assert_close(caches[2], caches[0], dtype)
    assert torch.equal(caches[3], caches[1])
    assert torch.equal(k, unrotated)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_the_fused_op_gives_the_bits_of_the_separate_ones(case: tuple, normed: bool, dtype: torch.dtype) -> None:
    *shape, interleaved = case
    fused, _, _, _, positions, cos_sin = _rope_case(dtype, *shape)
    heads, kv_heads, size, _ = shape
    norms = (torch.rand(size) + 0.5, torch.rand(size) + 0.5, 1e-6) if normed else (None, None, 0.0)
    turn, slots = Rotation(positions, cos_sin, interleaved, *norms), torch.tensor([9, 31, 10, 16, 3]).int()
    seen = []
    for ops in (table.table(), replace(table.table(), rope_write_kv=None)):
        q, k, v = fused.clone().unflatten(1, (heads + 2 * kv_heads, size)).split((heads, kv_heads, kv_heads), 1)
        caches = [torch.zeros(4, kv_heads, 8, size, dtype=dtype) for _ in "kv"]
        spec = AttentionSpec(0, heads, kv_heads, size, 1.0)
        seen.append([store(ops, spec, Heads(q, k, v, None, turn), (caches[0], caches[1]), slots), *caches])
    assert all(torch.equal(*pair) for pair in zip(*seen, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_write_kv(dtype: torch.dtype) -> None:
    k, v = torch.randn(3, 2, 16).to(dtype), torch.randn(3, 2, 24).to(dtype)
    caches = [torch.zeros(3, 2, 4, size, dtype=dtype) for size in (16, 24, 16, 24)]
    slots = torch.tensor([5, 11, 0]).int()
    ref.write_kv(k, v, caches[0], caches[1], slots)
    rope.write_kv(k, v, caches[2], caches[3], slots)
    assert torch.equal(caches[2], caches[0]) and torch.equal(caches[3], caches[1])


@pytest.mark.parametrize("scale", [torch.tensor([0.5]), torch.tensor([0.25, 4.0])])
def test_write_float8_saturates(scale: torch.Tensor) -> None:
    # Values that float8 holds exactly, divided too: the interpreter loses a carry that rounding makes.
    k, v = ((torch.randn(3, 2, 16) * 20).to(torch.float8_e4m3fn).float() for _ in range(2))
    k, v = (torch.where(one.abs() < 1, 1.0, one) for one in (k, v))
    k[1, 0, 3] = 1e6
    k8, v8 = (torch.zeros(2, 2, 4, 16, dtype=torch.float8_e4m3fn) for _ in range(2))
    rope.write_kv(k, v, k8, v8, torch.tensor([1, 2, 6]).int(), (scale, scale))
    want = (k / scale.view(1, -1, 1)).clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(k8[0, :, 1].float(), want[0].float())
    assert torch.equal(k8[0, :, 2].float(), want[1].float())
    assert torch.equal(k8[1, :, 2].float(), want[2].float())
    assert float(k8[0, 0, 2, 3]) == 448.0


def test_rows() -> None:
    x, index = torch.randn(6, 2100), torch.tensor([5, 0, 5])
    assert torch.equal(pages.select_rows(x, index), x[index])
    ids = torch.tensor([3, 1])
    half = x.half()
    assert torch.equal(pages.embedding(ids, half, 1.0), half[ids])
    assert torch.equal(pages.embedding(ids, half, 7.3), ref.embedding(ids, half, 7.3))


def test_nothing_to_do() -> None:
    """No tokens at all is no error."""
    empty = torch.zeros(0, 16)
    assert norm.rms_norm(empty, torch.ones(16), 1e-6).shape == (0, 16)
    assert activation.silu_and_mul(empty).shape == (0, 8)
    assert pages.select_rows(torch.randn(3, 4), torch.zeros(0, dtype=torch.int64)).shape == (0, 4)
    rope.write_kv(
        torch.zeros(0, 2, 16),
        torch.zeros(0, 2, 16),
        torch.zeros(1, 2, 4, 16),
        torch.zeros(1, 2, 4, 16),
        torch.zeros(0).int(),
    )


def test_tables_name_themselves() -> None:
    assert table.table().name == "triton" and table.invariant_table().name == "invariant"
    assert table.invariant_table().linear is not table.table().linear
