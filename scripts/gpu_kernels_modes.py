"""Checks of scripts/gpu_kernels.py for what kernels do beside the common: routers of other kinds, experts that were
chosen elsewhere, scales of rows, norms inside RoPE, float8 caches, recurrent layers."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from phloem.kernels import reference as ref
from phloem.kernels import reference_attention as attention_ref
from phloem.kernels import reference_experts as experts_ref
from phloem.kernels import reference_formats as formats
from phloem.kernels import reference_models as models_ref
from phloem.kernels import reference_scan as scan_ref
from phloem.kernels.ops import AttentionCall, Rotation, SharedPages
from phloem.kernels.specs import ExpertSpec, RouterSpec

if TYPE_CHECKING:
    from gpu_kernels import Kernels

Pairs = list[tuple[Tensor, Tensor]]


def starts(k: Kernels, counts: list[int]) -> Tensor:
    return k.tensor([0, *counts], torch.int64).cumsum(0).int()


def convolution(k: Kernels) -> Pairs:
    """Rows of many tokens, of one and of none, with an activation and with a bias."""
    from phloem.kernels.triton import recurrent

    counts, channels = ([5, 0, 1, 9], 70) if k.tiny else ([300, 0, 1, 65, 1], 4100)
    begin, pairs = starts(k, counts), []
    x = k.randn(sum(counts), channels + 16)[:, :channels]
    for width, bias, silu in ((4, None, True), (3, k.randn(channels, dtype=torch.float32), False)):
        weight = k.randn(channels, width, dtype=torch.float32)
        state = k.randn(len(counts), channels, width - 1, dtype=torch.float32)
        got = recurrent.causal_conv(x, weight, bias, state, begin, silu)
        pairs += list(zip(got, scan_ref.causal_conv(x.float(), weight, bias, state, begin, silu), strict=True))
    return pairs


def delta(k: Kernels) -> Pairs:
    """The delta rule with one decay a head and one for each entry of a key."""
    from phloem.kernels.triton import recurrent

    counts, heads, key, value = ([5, 0, 1, 9], 3, 32, 48) if k.tiny else ([70, 0, 1, 33, 1], 8, 128, 128)
    begin, tokens, pairs = starts(k, counts), sum(counts), []
    q, key_, v = (k.randn(tokens, heads, size) for size in (key, key, value))
    q, key_ = (F.normalize(one.float(), dim=-1).to(k.dtype) for one in (q, key_))
    for size in ((), (key,)):
        decay = -k.randn(tokens, heads, *size, dtype=torch.float32).abs()
        beta, state = k.randn(tokens, heads, dtype=torch.float32).sigmoid(), k.randn(len(counts), heads, key, value)
        state, wide = state.float(), (q.float(), key_.float(), v.float())
        got = recurrent.gated_delta(q, key_, v, decay, beta, state, begin, key**-0.5)
        pairs += list(zip(got, scan_ref.gated_delta(*wide, decay, beta, state, begin, key**-0.5), strict=True))
    return pairs


def _dense(found: tuple[Tensor, Tensor], experts: int) -> Tensor:
    """Weights by expert, of ids and weights: two that weigh the same may come in either order."""
    ids, weights = found
    return torch.zeros(len(ids), experts, device=ids.device).scatter_(1, ids.long(), weights.float())


def routers(k: Kernels) -> Pairs:
    from phloem.kernels.triton import moe, route

    found: list[tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], int]] = []
    for experts, spec in (
        (256, RouterSpec(8, "sigmoid", True, eps=1e-20, scale=2.5)),
        (256, RouterSpec(8, "sigmoid", True, eps=1e-20, scale=2.5, groups=8, keep=4)),
        (64, RouterSpec(6)),
        (160, RouterSpec(8, "sigmoid", True, scale=2.0)),
    ):
        logits = k.randn(7 if k.tiny else 300, experts, dtype=torch.float32, by=2)
        bias = k.randn(experts, dtype=torch.float32, by=0.1) if spec.score == "sigmoid" else None
        found.append((route.route_op(logits, bias, spec), models_ref.route(logits, bias, spec), experts))
    logits = k.randn(5, 64, dtype=torch.float32, by=2)
    (one, its_ids), (two, their_ids) = moe.route(logits, 6, False), experts_ref.route(logits, 6, False)
    found.append(((its_ids, one), (their_ids, two), 64))
    return [(_dense(got, experts), _dense(want, experts)) for got, want, experts in found]


def chosen(k: Kernels) -> Pairs:
    """A rank's share of the experts: ids of others add nothing."""
    from phloem.kernels.triton import moe

    count, width, inner = (4, 64, 48) if k.tiny else (32, 1024, 384)
    stacks = k.randn(count * 2 * inner, width, by=width**-0.5), k.randn(count * width, inner, by=inner**-0.5)
    spec, pairs = ExpertSpec(count, first=count), []
    for tokens in (1, 9) if k.tiny else (1, 40, 1000):
        x, ids = k.randn(tokens, width), k.ints(0, 3 * count, tokens, 4).int()
        weights = k.randn(tokens, 4, dtype=torch.float32).softmax(-1)
        want = models_ref.experts(x.float(), ids, weights, stacks[0].float(), stacks[1].float(), spec)
        pairs.append((moe.experts_op(x, ids, weights, *stacks, spec), want))
    return pairs


Two = tuple[Tensor, Tensor]


def _float8_experts(k: Kernels, blocks: bool) -> tuple[Two, Two, Two]:
    """Stacks in float8, their scales, and what they are in float32."""
    count, width, inner = (4, 256, 128) if k.tiny else (32, 1024, 384)
    plain = k.randn(count, 2 * inner, width, by=width**-0.5), k.randn(count, width, inner, by=inner**-0.5)
    made = []
    for stack in plain:
        if blocks:
            made.append(formats.quantise_blocks(stack.float(), k.fp8))
        else:
            values, scale = formats.quantise_fp8(stack.flatten(0, 1), k.fp8)
            made.append((values.view(stack.shape), scale.view(stack.shape[:2])))
    (first, one), (second, two) = made
    if blocks:
        wide = formats.spread_blocks(first, one), formats.spread_blocks(second, two)
    else:
        wide = first.float() * one[..., None], second.float() * two[..., None]
    return (first, second), (one, two), wide


def moe_fp8_few(k: Kernels) -> Pairs:
    """Two tokens, whose activations keep their type, routed before and by the first product; scales of both kinds."""
    from phloem.kernels.triton import moe
    from phloem.kernels.triton.weights import Float8Blocks, Float8Rows

    pairs: Pairs = []
    for blocks, form in ((True, Float8Blocks), (False, Float8Rows)):
        stacks, scales, wide = _float8_experts(k, blocks)
        x, logits = k.randn(2, stacks[0].shape[2]), k.randn(2, len(stacks[0]), dtype=torch.float32, by=2)
        weights, ids = experts_ref.route(logits, 2, True)
        want = experts_ref.experts(x.float(), weights, ids, *wide)
        pairs.append((moe.experts(x, weights, ids, *stacks, scales=scales), want))
        flat = [form(s.flatten(0, 1), one.flatten(0, 1)) for s, one in zip(stacks, scales, strict=True)]
        pairs.append((moe.moe(x, logits, flat[0], flat[1], 2, True), want))
    return pairs


def moe_fp8_rows(k: Kernels) -> Pairs:
    """Scales of rows: some tokens, and each form for many of them."""
    from phloem.kernels.triton import moe, trial

    stacks, scales, wide = _float8_experts(k, blocks=False)
    count, pairs = len(stacks[0]), Pairs()

    def drawn(tokens: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x = k.randn(tokens, stacks[0].shape[2])
        weights, ids = experts_ref.route(k.randn(tokens, count, dtype=torch.float32, by=2), 2, True)
        values, by_token = formats.quantise_fp8(x, k.fp8)
        return x, weights, ids, experts_ref.experts(values.float() * by_token[:, None], weights, ids, *wide)

    if not k.tiny:
        x, weights, ids, want = drawn(40)
        pairs.append((moe.experts(x, weights, ids, *stacks, scales=scales), want))
    x, weights, ids, want = drawn(20 if k.tiny else 1111)
    pairs.append((moe.experts(x, weights, ids, *stacks, scales=scales), want))
    few = trial.capability(k.device) < trial.CAPABLE or k.dtype == torch.float32
    if k.device.type == "cuda" and few:
        return pairs
    work = trial.Work(*stacks, 0, scales, moe.parts_of_tiles)
    lists = moe.sort_by_expert(ids, count, 128)
    parts = [work.form(form, x, weights, lists) for form in work.forms]
    return pairs + [(part.view(*ids.shape, x.shape[1]).float().sum(1), want) for part in parts]


def rope_norms(k: Kernels) -> Pairs:
    """q and k normalised on the way."""
    return _rope(k, ((False, True, False), (True, True, False)))


def rope_float8(k: Kernels) -> Pairs:
    """Keys and values into a float8 cache with scales, with and without norms."""
    return _rope(k, ((False, True, True), (False, False, True)))


def _rope(k: Kernels, kinds: tuple[tuple[bool, bool, bool], ...]) -> Pairs:
    """`kinds`: interleaved, norms, float8."""
    from phloem.kernels.triton import rope

    tokens, heads, kv_heads, size = (5, 3, 2, 32) if k.tiny else (300, 32, 8, 128)
    angles = torch.rand(500, size // 2, device=k.device) * 6
    cos_sin, pairs = torch.stack((angles.cos(), angles.sin()), 1).contiguous(), []
    scales = k.tensor([0.5], torch.float32), k.tensor([2.0], torch.float32)
    for interleaved, norms, float8 in kinds:
        q, key, v = (k.randn(tokens, count, size) for count in (heads, kv_heads, kv_heads))
        weights, positions = (k.randn(size), k.randn(size)), k.ints(0, 500, tokens)
        slots = torch.randperm(tokens * 2, generator=k.generator, device=k.device)[:tokens].int()
        want_q, want_k = q.float(), key.float()
        if norms:
            want_q, want_k = (ref.rms_norm(x, w.float(), 1e-6) for x, w in zip((want_q, want_k), weights, strict=True))
        want_q, want_k = want_q.clone(), want_k.clone()
        ref.rope_(want_q, want_k, positions, cos_sin, interleaved)
        dtype = k.fp8 if float8 else k.dtype
        caches = [torch.zeros(tokens, kv_heads, 4, size, device=k.device).to(dtype) for _ in "kv"]
        want = [torch.zeros(cache.shape, device=k.device) for cache in caches]
        by = (1.0, 1.0) if not float8 else (0.5, 2.0)
        ref.write_kv(want_k / by[0], v.float() / by[1], want[0], want[1], slots)
        turn = Rotation(positions, cos_sin, interleaved)
        if norms:
            turn = replace(turn, q_norm=weights[0], k_norm=weights[1], eps=1e-6)
        got = rope.rope_write_kv(q, key, v, turn, caches[0], caches[1], slots, scales if float8 else None)
        pairs += [(got, want_q), *((cache.float(), one) for cache, one in zip(caches, want, strict=True))]
        if float8 and not norms:
            again = [torch.zeros_like(cache) for cache in caches]
            rope.write_kv(want_k.to(k.dtype), v, again[0], again[1], slots, scales)
            pairs += [(cache.float(), one) for cache, one in zip(again, want, strict=True)]
    return pairs


def attention_modes(k: Kernels) -> Pairs:
    """Decode steps with a cap and a window in several splits, sinks in one, splits of a fixed size; shared pages with a
    cap, and in float8."""
    lengths, head = ([3, 200] if k.tiny else [1, 17, 1024, 3333]), 32 if k.tiny else 128
    ones: list[int] = [1] * len(lengths)
    return [
        k._attend(ones, lengths, head, 8, 4, window=150, cap=5.0, splits=3),
        k._attend(ones, lengths, head, 8, 1, window=128, sinks=True, splits=1),
        k._attend(ones, lengths, head, 8, 2, split_size=64),
        *_shared(k, AttentionCall(0.125, 0, 20.0)),
        *_shared(k, AttentionCall(0.125), float8=True),
    ]


def _shared(k: Kernels, call: AttentionCall, float8: bool = False) -> Pairs:
    from phloem.attention._cascade import Sharing, find
    from phloem.kernels.triton import attention

    cheap = Sharing(tile=16, programs=264, splits=(16, 8), token_bytes=1 << 30, part_bytes=1)
    lengths, queries = [300, 500, 310, 270], [1] * 4
    batch = k.paged(queries, lengths)
    batch.page_table[1, :16] = batch.page_table[3, :16] = batch.page_table[0, :16]
    table, before = batch.page_table.cpu().numpy(), (torch.tensor(lengths) - 1).int().numpy()
    found = find(table, torch.tensor(queries).int().numpy(), before, 16, 0, cheap)
    assert found is not None
    pages = SharedPages(*(torch.from_numpy(array).to(k.device) for array in found.arrays))
    caches = [k.randn(int(batch.page_table.max()) + 1, 2, 16, 64) for _ in "kv"]
    how: dict[str, Any] = {}
    if float8:
        caches = [cache.to(k.fp8) for cache in caches]
        how["scales"] = (k.randn(2, dtype=torch.float32).abs() + 0.5,) * 2
    q, cache = k.randn(4, 8, 64), (caches[0], caches[1])
    got = attention.decode_attention(q, cache, replace(batch, shared=pages), call, **how)
    return [(got, attention_ref.paged_attention(q.float(), cache, batch, call, **how))]


def float8_rest(k: Kernels) -> Pairs:
    """A norm that writes float8 without a sum before it."""
    from phloem.kernels.triton import norm

    x, weight = k.randn(7, 1152), k.randn(1152).abs() + 0.5
    want = ref.rms_norm(x.float(), weight.float(), 1e-6)
    values, scale, _ = norm.rms_norm_fp8(x, None, weight, 1e-6, k.fp8, grouped=False)
    return [(values.float() * scale[:, None], want)]


def few_rows_splits(k: Kernels) -> Pairs:
    """So many features that a product is cut into splits, without a bias."""
    from phloem.kernels.triton import gemm_fp8

    x = k.randn(3, 4096, by=0.1)
    values, scale = formats.quantise_fp8(k.randn(64, 4096).float(), k.fp8)
    return [(gemm_fp8.few_rows_gemm(x, values, scale, None), F.linear(x.float(), values.float() * scale[:, None]))]


CHECKS = {
    "convolution": convolution,
    "delta": delta,
    "routers": routers,
    "chosen": chosen,
    "moe_fp8_few": moe_fp8_few,
    "moe_fp8_rows": moe_fp8_rows,
    "rope_norms": rope_norms,
    "rope_float8": rope_float8,
    "attention_modes": attention_modes,
    "float8_rest": float8_rest,
    "few_rows_splits": few_rows_splits,
}
ROUNDED = {"moe_fp8_rows": 0.04, "rope_float8": 0.04, "float8_rest": 0.04}
