"""Attention of packed texts: the native op against the reference and torch's, whatever lies beside a text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from linear_cases import cases, needs_native
from torch.nn import functional as F

from phloem.attention._packed import PackedMemory
from phloem.kernels import native
from phloem.kernels import reference_attention as ref
from phloem.kernels.ops import AttentionCall, Ops, Rotation
from phloem.layers.context import AttentionSpec, Heads

pytestmark = needs_native


@pytest.fixture(params=cases(1, 2))
def ops(request: Any) -> Iterator[Ops]:
    level, threads = request.param
    yield native.table(threads, level)
    native.runtime().library.set_level(None)


def starts_of(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0).to(torch.int32)


def heads_of(
    lengths: list[int], heads: int, kv_heads: int, size: int, values: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k and v side by side, as a fused layer gives them."""
    widths = [heads * size, kv_heads * size, kv_heads * (values or size)]
    made = torch.randn(sum(lengths), sum(widths) + 3)[:, : sum(widths)] * 1.5
    q, k, v = made.split(widths, -1)
    return q.unflatten(-1, (heads, -1)), k.unflatten(-1, (kv_heads, -1)), v.unflatten(-1, (kv_heads, -1))


SHAPES = {
    "windows": ([64, 64, 64, 16, 48], 3, 3, 80, 0),
    "a picture": ([257], 2, 2, 64, 0),
    "72": ([100, 1, 30], 2, 2, 72, 0),
    "88": ([70, 129], 2, 2, 88, 0),
    "128, grouped": ([65, 200], 6, 2, 128, 0),
    "tiny and odd": ([5, 2, 1, 9], 2, 1, 5, 3),
    "wide values": ([40, 33], 4, 2, 24, 40),
    "an empty text": ([12, 0, 12], 2, 2, 32, 0),
    "many heads of one": ([130], 40, 1, 16, 0),
    "256": ([70], 1, 1, 256, 0),
}
CALLS = {
    "both ways": AttentionCall(0.2, causal=False),
    "causal": AttentionCall(0.2),
    "window": AttentionCall(0.2, window=20),
    "window both ways": AttentionCall(0.2, window=7, causal=False),
    "chunks": AttentionCall(0.2, chunk=16),
    "chunks both ways": AttentionCall(0.2, chunk=24, causal=False),
    "blocks": AttentionCall(0.2, block=8),
    "soft cap": AttentionCall(0.2, softcap=3.0, causal=False),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_texts_that_see_themselves_whole(ops: Ops, shape: str) -> None:
    torch.manual_seed(len(shape))
    lengths, heads, kv_heads, size, values = SHAPES[shape]
    q, k, v = heads_of(lengths, heads, kv_heads, size, values)
    got = ops.packed_attention(q, k, v, starts_of(lengths), AttentionCall(size**-0.5, causal=False), None)
    at = 0
    for length in lengths:
        one = [x[at : at + length].transpose(0, 1)[None] for x in (q, k, v)]
        want = F.scaled_dot_product_attention(*one, scale=size**-0.5, enable_gqa=heads != kv_heads)
        torch.testing.assert_close(got[at : at + length], want[0].transpose(0, 1), rtol=1e-5, atol=1e-5)
        at += length


@pytest.mark.parametrize("extras", [False, True])
@pytest.mark.parametrize("call", CALLS)
def test_what_a_layer_may_ask(ops: Ops, call: str, extras: bool) -> None:
    """As the reference, with sinks and numbers for distances as well; of 100 and more tokens blocks end inside."""
    torch.manual_seed(len(call))
    lengths, asked = [150, 1, 64, 33], CALLS[call]
    q, k, v = heads_of(lengths, 4, 2, 48)
    distances = torch.randn(4, 2 * 160 - 1) if extras else None
    asked = AttentionCall(
        asked.scale,
        asked.window,
        asked.softcap,
        torch.randn(4) if extras else None,
        causal=asked.causal,
        chunk=asked.chunk,
        block=asked.block,
    )
    got = ops.packed_attention(q, k, v, starts_of(lengths), asked, distances)
    want = ref.packed_attention(q, k, v, starts_of(lengths), asked, distances)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_neither_threads_nor_neighbours_change_a_bit() -> None:
    torch.manual_seed(1)
    lengths = [300, 17, 64, 401]
    q, k, v = heads_of(lengths, 4, 4, 80)
    call = AttentionCall(80**-0.5, causal=False)
    found = [native.table(threads).packed_attention(q, k, v, starts_of(lengths), call, None) for threads in (1, 2, 5)]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    alone = native.table(2).packed_attention(q[381:], k[381:], v[381:], starts_of([401]), call, None)
    assert torch.equal(alone, found[0][381:])


def test_a_nan_stays_in_its_text_and_is_not_hidden(ops: Ops) -> None:
    lengths = [70, 70]
    for which in range(3):
        given = [x.clone() for x in heads_of(lengths, 2, 2, 32)]
        given[which][75, 1, 3] = float("nan")
        out = ops.packed_attention(*given, starts_of(lengths), AttentionCall(0.2, causal=False), None)
        assert out[:70].isfinite().all() and out[:, 0].isfinite().all()
        assert out[75 if which == 0 else slice(70, None), 1].isnan().any(-1).all()


@pytest.mark.parametrize("rule", ["both ways", "causal", "window both ways"])
def test_layers_attend_by_it_as_by_torch_s(ops: Ops, rule: str) -> None:
    """Through the one door that towers and embedding models have, rotation included."""
    torch.manual_seed(3)
    lengths, call = [64, 64, 30, 64, 100], CALLS[rule]
    q, k, v = heads_of(lengths, 4, 2, 40)
    angles = torch.rand(sum(lengths), 20) * 6
    turn = Rotation(torch.arange(sum(lengths)), torch.stack([angles.cos(), angles.sin()], 1).contiguous(), False)
    spec = AttentionSpec(0, 4, 2, 40, 0.2, window=call.window, causal=call.causal)
    got, want = (
        PackedMemory(table, lengths).attend(spec, Heads(q.clone(), k.clone(), v, rotation=turn))
        for table in (ops, Ops())
    )
    assert got.shape == (sum(lengths), 4, 40) and got.is_contiguous()
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("lengths", "size", "causal", "own"),
    [
        ([300, 300], 64, False, False),  # where torch's is the faster one
        ([300, 300], 72, False, True),
        ([300, 299], 64, False, True),
        ([300, 300], 64, True, True),
        ([64, 64], 64, False, True),
    ],
)
def test_who_attends(lengths: list[int], size: int, causal: bool, own: bool) -> None:
    asked: list[Any] = []
    table = native.table(2)

    def noted(*given: Any) -> torch.Tensor:
        asked.append(given)
        return table.packed_attention(*given)

    q, k, v = heads_of(lengths, 2, 2, size)
    spec = AttentionSpec(0, 2, 2, size, 0.1, causal=causal)
    found = PackedMemory(replace(table, packed_attention=noted), lengths).attend(spec, Heads(q, k, v))
    assert bool(asked) == own
    want = ref.packed_attention(q, k, v, starts_of(lengths), AttentionCall(0.1, causal=causal))
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)


def test_what_does_not_fit_is_refused(ops: Ops) -> None:
    q, k, v = heads_of([20, 4], 4, 2, 16)
    starts, call = starts_of([20, 4]), AttentionCall(0.25, causal=False)
    for wrong in ([0, 20, 25], [1, 20, 24], [0, 25, 24], [24]):
        with pytest.raises(ValueError, match="must rise from 0"):
            ops.packed_attention(q, k, v, torch.tensor(wrong, dtype=torch.int32), call, None)
    with pytest.raises(TypeError, match="int32"):
        ops.packed_attention(q, k, v, starts.long(), call, None)
    with pytest.raises(ValueError, match="do not fit"):
        ops.packed_attention(q, k[:-1], v[:-1], starts, call, None)
    with pytest.raises(ValueError, match="do not fit"):
        ops.packed_attention(q[:, :3], k, v, starts, call, None)
    with pytest.raises(TypeError, match="float32"):
        ops.packed_attention(q.bfloat16(), k, v, starts, call, None)
    with pytest.raises(ValueError, match="too few for the longest"):
        ops.packed_attention(q, k, v, starts, call, torch.zeros(4, 38))
    with pytest.raises(TypeError, match="distances must be contiguous float32"):
        ops.packed_attention(q, k, v, starts, call, torch.zeros(39, 4).T)
    with pytest.raises(TypeError, match="sinks must be"):
        ops.packed_attention(q, k, v, starts, AttentionCall(0.25, sinks=torch.zeros(3)), None)
