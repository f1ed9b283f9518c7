"""The kernel launches that are compiled ahead of time: every kernel, in the shapes of models that are served.

Each case calls the same host function as the engine, on tensors without data (`meta`), so what is compiled is what
would be launched, tile shapes and alignment included, and no case can wait for a value on the device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from phloem.kernels.calls import IndexCall, PooledStates
from phloem.kernels.narrow import Narrow
from phloem.kernels.ops import Adapters, AttentionCall, Draw, LatentCall, PagedBatch, Rotation, SharedPages
from phloem.kernels.specs import ExpertSpec, RouterSpec
from phloem.kernels.triton import (
    activation,
    attention,
    gates,
    gemm_fp8,
    gemm_gguf,
    gemm_int,
    gemm_mxfp4,
    invariant,
    lora,
    mla,
    moe,
    narrow_gguf,
    norm,
    pages,
    quantise,
    recurrent,
    rope,
    route,
    sample,
    scan,
    sparse,
    tokens,
)
from phloem.kernels.triton.weights import Float8Blocks, Float8Rows, Form, Int4Experts, Mxfp4Weight

BF16, F32, I32, I64 = torch.bfloat16, torch.float32, torch.int32, torch.int64
F16, U8 = torch.float16, torch.uint8


@dataclass(frozen=True)
class Case:
    """`run` launches kernels; it gets the target's float8 type, or is not run where `float8` and there is none."""

    name: str
    run: Callable[[torch.dtype], Any]
    float8: bool = False
    quick: bool = False  # part of the reduced set that the test suite compiles


def t(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def batch(rows: int, tokens: int, page: int = 16, context: int = 8192) -> PagedBatch:
    return PagedBatch(
        t(rows + 1, dtype=I32),
        t(rows, dtype=I32),
        t(rows, context // page, dtype=I32),
        t(tokens, dtype=I32),
        1 if tokens == rows else tokens,
        context,
    )


def _attend(
    rows: int,
    tokens: int,
    heads: int,
    kv_heads: int,
    head: int,
    float8: torch.dtype | None = None,
    dtype: torch.dtype = BF16,
    window: int = 0,
    cap: float = 0.0,
    sinks: bool = False,
    shared: bool = False,
    **options: Any,
) -> None:
    cache = t(1000, kv_heads, 16, head, dtype=float8 or dtype)
    run = attention.decode_attention if rows == tokens else attention.extend_attention
    if float8 is not None:
        options["scales"] = (t(kv_heads, dtype=F32), t(kv_heads, dtype=F32))
    call = AttentionCall(head**-0.5, window, cap, t(heads) if sinks else None)
    rows_of = batch(rows, tokens)
    if shared:
        rows_of.shared = _shared(rows, tokens)
    run(t(tokens, heads, head, dtype=dtype), (cache, cache), rows_of, call, **options)


def _shared(rows: int, tokens: int) -> SharedPages:
    groups, members = rows // 2, min(tokens, 512)
    numbers = t(groups + 1, dtype=I32), t(groups, 3, dtype=I32), t(members, dtype=I32), t(members, dtype=I32)
    return SharedPages(t(rows, dtype=I32), *numbers, t(tokens, dtype=I32))


def _mla(rows: int, tokens: int) -> None:
    q_nope, q_rope, cache = t(tokens, 128, 128), t(tokens, 128, 64), t(1000, 1, 16, 576)
    call = LatentCall(t(128, 128, 512), t(128, 512, 128), 0.1)
    mla.latent_attention(q_nope, q_rope, cache, batch(rows, tokens), call)


def _sparse(rows: int, tokens: int, dtype: torch.dtype = BF16, heads: int = 128) -> None:
    """DeepSeek-V3.2's: 64 cheap heads of 128, of which 2,048 positions come."""
    q_nope, q_rope = t(tokens, heads, 128, dtype=dtype), t(tokens, heads, 64, dtype=dtype)
    cache, keys = t(1000, 1, 16, 576, dtype=dtype), t(1000, 1, 16, 128, dtype=dtype)
    call = LatentCall(t(heads, 128, 512, dtype=dtype), t(heads, 512, 128, dtype=dtype), 0.1)
    index = IndexCall(t(tokens, 64, 128, dtype=dtype), t(tokens, 128, dtype=dtype), t(tokens, 64, dtype=dtype), 2048)
    step = batch(rows, tokens)
    sparse.write_latent(t(tokens, 576, dtype=dtype), cache, step.token_slots)
    chosen = sparse.choose_keys(index, keys, step)
    sparse.chosen_latent_attention(q_nope, q_rope, cache, step, call, chosen)


def _rope(interleaved: bool, cache_dtype: torch.dtype, scaled: bool) -> None:
    q, k, v = t(64, 32, 128), t(64, 8, 128), t(64, 8, 128)
    cos_sin, positions = t(8192, 2, 64, dtype=F32), t(64, dtype=I64)
    cache, slots = t(1000, 8, 16, 128, dtype=cache_dtype), t(64, dtype=I32)
    scales = (t(1, dtype=F32), t(1, dtype=F32)) if scaled else None
    rope.rope_(q, k, positions, cos_sin, interleaved)
    rope.write_kv(k, v, cache, cache, slots, scales)
    rope.rope_write_kv(q, k, v, Rotation(positions, cos_sin, interleaved), cache, cache, slots, scales)
    rope.mrope_table(t(3, 64, dtype=I64), cos_sin, (16, 24, 24), interleaved)
    norms = Rotation(positions, cos_sin, interleaved, t(128), t(128), 1e-6)
    rope.rope_write_kv(q, k, v, norms, cache, cache, slots, scales)


def _norms(dtype: torch.dtype, features: int) -> None:
    x, weight = t(64, features, dtype=dtype), t(features, dtype=dtype)
    norm.rms_norm(x, weight, 1e-6)
    norm.add_rms_norm(x, x, weight, 1e-6)
    norm.rms_norm(t(64, 48, 128, dtype=dtype), t(128, dtype=dtype), 1e-6)


def _elementwise() -> None:
    activation.silu_and_mul(t(64, 28672))
    activation.gelu_tanh_and_mul(t(64, 28672))
    activation.add(t(64, 4096), t(64, 4096))
    activation.softcap(t(64, 256000, dtype=F32), 30.0)


def _tokens() -> None:
    ids, last = t(64, dtype=I64), t(256, dtype=I64)
    tokens.late_tokens_(ids, last, ids)
    tokens.keep_tokens_(last, ids, t(64, dtype=I32), t(64))


def _pages() -> None:
    pages.embedding(t(64, dtype=I64), t(128256, 4096), 64.0)
    pages.select_rows(t(64, 4096), t(8, dtype=I64))


def _sample(vocab: int) -> None:
    logits = t(32, vocab, dtype=F32)
    column, number = t(32, dtype=F32), t(32, dtype=I32)
    sample.sample(logits, Draw(column, number, column, column, t(32, dtype=I64), t(32, dtype=I64)))


def _logits(vocab: int) -> None:
    logits = t(32, vocab, dtype=F32)
    sample.logsumexp(logits)
    slots, words = t(32, dtype=I32), t(32, -(-vocab // 32), dtype=I32)
    sample.mask_tokens_(logits, slots, words)


def _moe(tokens: int, float8: torch.dtype | None = None, rows: bool = False) -> None:
    """Qwen3-30B-A3B: 128 experts, 8 a token. In float8 with scales of blocks, or of rows."""
    dtype = float8 or BF16
    weights, ids, lists = moe.route_and_sort(t(tokens, 128), 8, True, moe.tile_size(tokens * 8, 128))
    gate_up, down = t(128, 1536, 2048, dtype=dtype), t(128, 2048, 768, dtype=dtype)
    scales = (t(128, 12, 16, dtype=F32), t(128, 16, 6, dtype=F32)) if float8 else None
    if rows:
        scales = t(128, 1536, dtype=F32), t(128, 2048, dtype=F32)
    moe.experts(t(tokens, 2048), weights, ids, gate_up, down, scales=scales, lists=lists)


def _moe_op(tokens: int, experts: int = 128, top_k: int = 8) -> None:
    """The op table's entry, of the same sizes."""
    gate_up, down = t(experts * 1536, 2048), t(experts * 2048, 768)
    moe.moe(t(tokens, 2048), t(tokens, experts), gate_up, down, top_k, True)


def _moe_op_float8(float8: torch.dtype) -> None:
    """With narrow stacks, scales of blocks and of rows, routed by the first product."""
    values = t(128 * 1536, 2048, dtype=float8), t(128 * 2048, 768, dtype=float8)
    blocks = t(128 * 12, 16, dtype=F32), t(128 * 16, 6, dtype=F32)
    rows = t(128 * 1536, dtype=F32), t(128 * 2048, dtype=F32)
    for form, scales in ((Float8Blocks, blocks), (Float8Rows, rows)):
        gate_up, down = (form(*pair) for pair in zip(values, scales, strict=True))
        moe.moe(t(2, 2048), t(2, 128), gate_up, down, 8, True)


def _int4(experts: int, rows: int, columns: int, group: int = 128, zeros: bool = False) -> Form:
    scale = t(experts, columns // group, rows // experts, dtype=F16)
    return Int4Experts(t(rows, columns // 2, dtype=U8), scale, scale if zeros else None)


def _mxfp4(rows: int, columns: int) -> Form:
    """Of 32 experts."""
    return Mxfp4Weight(t(rows, columns // 2, dtype=U8), t(32, columns // 32, rows // 32, dtype=U8))


def _clamped(tokens: int, make: Callable[[int, int], Tensor | Form] = t, dtype: torch.dtype = BF16) -> None:
    """gpt-oss-20b: 32 experts with biases, 4 a token."""
    spec, biases = ExpertSpec(32, "swiglu_clamp"), (t(32 * 5760, dtype=F32), t(32 * 2880, dtype=F32))
    ids, weights = t(tokens, 4, dtype=I32), t(tokens, 4, dtype=F32)
    stacks = make(32 * 5760, 2880), make(32 * 2880, 2880)
    moe.experts_op(t(tokens, 2880, dtype=dtype), ids, weights, *stacks, spec, biases)


def _odd_experts(tokens: int) -> None:
    """Llama 4's, whose weights scale what is read, and NemotronH's, without a gate."""
    for spec, rows in ((ExpertSpec(16, scale_input=True), 16384), (ExpertSpec(16, "relu2", gated=False), 8192)):
        ids, weights = t(tokens, 1, dtype=I32), t(tokens, 1, dtype=F32)
        moe.experts_op(t(tokens, 5120), ids, weights, t(16 * rows, 5120), t(16 * 5120, 8192), spec)


def _moe_int4(tokens: int, group: int, zeros: bool) -> None:
    """Qwen3-30B-A3B."""
    gate_up, down = _int4(128, 128 * 1536, 2048, group, zeros), _int4(128, 128 * 2048, 768, group, zeros)
    moe.moe(t(tokens, 2048), t(tokens, 128), gate_up, down, 8, True)


def _route(experts: int, top_k: int, sigmoid: bool, bias: bool) -> None:
    """Routers that are no plain softmax: MiniMax-M2 and GLM-4.5 score by a sigmoid with a correction."""
    correction = t(experts, dtype=F32) if bias else None
    moe.route(t(64, experts), top_k, sigmoid, sigmoid=sigmoid, bias_E=correction, scaling=2.5)


def _late_router() -> None:
    """gpt-oss's, and Llama 4's."""
    route.route_op(t(64, 32), None, RouterSpec(4, "chosen_softmax"))
    route.route_op(t(64, 16), None, RouterSpec(1, "chosen_sigmoid"))


def _grouped_router() -> None:
    """DeepSeek-V3's."""
    spec = RouterSpec(8, "sigmoid", True, eps=1e-20, scale=2.5, groups=8, keep=4)
    route.route_op(t(64, 256), t(256, dtype=F32), spec)


def _chosen_experts() -> None:
    for count in (1, 64, 2048):
        ids, weights = t(count, 8, dtype=I32), t(count, 8, dtype=F32)
        moe.experts_op(t(count, 2048), ids, weights, t(64 * 1536, 2048), t(64 * 2048, 768), ExpertSpec(64, first=64))


def _quantise(float8: torch.dtype) -> None:
    quantise.per_token_fp8(t(64, 4096), float8)
    quantise.per_group_fp8(t(64, 4096), float8)


def _gemm_fp8(tokens: int, float8: torch.dtype) -> None:
    x, weight = t(tokens, 4096, dtype=float8), t(6144, 4096, dtype=float8)
    gemm_fp8.block_scaled_gemm(x, t(tokens, 32, dtype=F32), weight, t(48, 32, dtype=F32), None, BF16)


def _few_rows(dtype: torch.dtype, float8: torch.dtype) -> None:
    x, weight = t(4, 4096, dtype=dtype), t(6144, 4096, dtype=float8)
    gemm_fp8.few_rows_gemm(x, weight, t(48, 32, dtype=F32), None)
    gemm_fp8.few_rows_gemm(x, weight, t(6144, dtype=F32), None)


def _norm_fp8(float8: torch.dtype) -> None:
    x, weight = t(64, 4096), t(4096)
    norm.rms_norm_fp8(x, x, weight, 1e-6, float8, grouped=True)
    norm.rms_norm_fp8(x, None, weight, 1e-6, float8, grouped=False)


def _gemm_int(tokens: int) -> None:
    x = t(tokens, 4096)
    gemm_int.int4_gemm(x, t(6144, 2048, dtype=torch.uint8), t(6144, 32, dtype=F32), t(6144, 32, dtype=F32))
    half = t(6144, 128, dtype=torch.float16)  # as loaded: groups of 32, the scales of a checkpoint
    gemm_int.int4_gemm(x, t(6144, 2048, dtype=torch.uint8), half, half)


def _grouped(tokens: int, dtype: torch.dtype, *kinds: str) -> None:
    """Products with matrices of GGUF's types, and with rows of 8-bit integers; their rows by number, and copies."""
    device, x = torch.device("meta"), t(tokens, 4096, dtype=dtype)
    for kind in kinds:
        rows = Narrow("int8", 1, 4096, zeros=kind == "zeros")
        form = Narrow("gguf", 1, 32, stored=kind) if kind in narrow_gguf.KINDS else rows
        run = narrow_gguf.empty(form, 6144, 4096, device)
        gemm_gguf.grouped_gemm(x, [run])
        gemm_gguf.chosen_rows([run], t(tokens, dtype=torch.int64), F32)


def _gemm_mxfp4() -> None:
    for count in (1, 64, 2048):
        gemm_mxfp4.mxfp4_gemm(t(count, 2880), t(5120, 1440, dtype=U8), t(1, 90, 5120, dtype=U8), t(5120))


def _lora() -> None:
    index, facts, ends = t(64, dtype=I32), t(8, 2, dtype=I32), torch.tensor([4096, 5120, 6144])
    factor, shift = t(8, 6144, dtype=F32), t(8, 6144, dtype=F32)
    adapters = Adapters(index, facts, t(8, 3, 16, 4096), t(8, 16, 6144), factor, shift, ends)
    lora.add_adapters(t(64, 6144), t(64, 4096), adapters)


def _no_float8(run: Callable[..., Any], *args: Any, **options: Any) -> Callable[[torch.dtype], Any]:
    return lambda _: run(*args, **options)


def _states(rows: int, pooled: bool, *shape: int) -> Tensor | PooledStates:
    if not pooled:
        return t(rows, *shape, dtype=F32)
    places = t(rows, dtype=torch.int64)
    return PooledStates(t(2 * rows + 1, *shape, dtype=F32), places, places, t(rows, dtype=torch.bool))


def _delta(rows: int, tokens: int, each: bool) -> None:
    heads, size = 32, 128
    x, state = t(tokens, 3 * heads * size), _states(rows, True, 3 * heads * size, 3)
    starts, weight = t(rows + 1, dtype=I32), t(3 * heads * size, 4, dtype=F32)
    mixed, _ = recurrent.causal_conv(x, weight, None, state, starts)
    q, k, v = (part.unflatten(-1, (heads, size)) for part in mixed.split(heads * size, -1))
    own = (heads, size) if each else (heads,)
    log = t(heads, *([1] if each else []), dtype=F32)
    decay, beta = gates.delta_gates(t(tokens, *own), t(tokens, heads), t(*own, dtype=F32), log)
    gates.gated_rms_norm(v, v, t(size, dtype=F32), 1e-6, 0, True)
    recurrent.gated_delta(q, k, v, decay, beta, _states(rows, True, heads, size, size), starts, size**-0.5)


def _odd_delta() -> None:
    """In float32, with a value wider than a key, no power of two, as tiny models have it."""
    heads, key, value = 6, 64, 96
    q, k, v = t(300, heads, key, dtype=F32), t(300, heads, key, dtype=F32), t(300, heads, value, dtype=F32)
    decay, beta, state = t(300, heads, dtype=F32), t(300, heads, dtype=F32), t(4, heads, key, value, dtype=F32)
    recurrent.gated_delta(q, k, v, decay, beta, state, t(5, dtype=I32), key**-0.5)


def _short_conv() -> None:
    """LFM2's, with a bias."""
    starts, state = t(33, dtype=I32), _states(32, True, 2048, 2)
    recurrent.causal_conv(t(32, 2048), t(2048, 3, dtype=F32), t(2048, dtype=F32), state, starts, silu=False)


def _mamba2(rows: int, tokens: int, heads: int, groups: int, state: int, dtype: torch.dtype = BF16) -> None:
    """Heads of 64; bounds on the steps as Nemotron-H has them."""
    inner, shared = heads * 64, groups * state
    mixed = t(tokens, inner + 2 * shared + heads, dtype=dtype)
    x, b, c, dt = mixed.split([inner, shared, shared, heads], -1)
    x, b, c = x.unflatten(-1, (heads, 64)), b.unflatten(-1, (groups, state)), c.unflatten(-1, (groups, state))
    vector, starts = t(heads, dtype=F32), t(rows + 1, dtype=I32)
    steps, vector = gates.step_sizes(dt, vector, 0.001, 0.1), gates.decays(vector)
    for size, first in ((inner // groups, False), (inner // groups, True)):
        gates.gated_rms_norm(t(tokens, inner, dtype=dtype), mixed[:, :inner], t(inner, dtype=F32), 1e-6, size, first)
    for pooled in (False, True):
        scan.mamba2_scan(x, steps, vector, b, c, vector, _states(rows, pooled, heads, 64, state), starts)


def _mamba1(rows: int, tokens: int, channels: int, dtype: torch.dtype = BF16) -> None:
    """Jamba's and Falcon Mamba's; 16 numbers a channel."""
    x, low, starts = (
        t(tokens, 2 * channels, dtype=dtype)[:, :channels],
        t(tokens, 288, dtype=dtype),
        t(rows + 1, dtype=I32),
    )
    steps = gates.step_sizes(t(tokens, channels, dtype=dtype), t(channels, dtype=F32), 0.0, float("inf"))
    rates, skip, (b, c) = t(channels, 16, dtype=F32), t(channels, dtype=F32), low[:, 256:].split(16, -1)
    for pooled in (False, True):
        scan.selective_scan(x, steps, rates, b, c, skip, _states(rows, pooled, channels, 16), starts)


def cases() -> list[Case]:
    """All of them; kernels that differ only in a compile-time choice count once per choice that models make."""
    plain = _no_float8
    return [
        Case("decode, 32 rows, GQA 32/8, D 128", plain(_attend, 32, 32, 32, 8, 128), quick=True),
        Case("decode, 1 row, GQA 32/8, D 128", plain(_attend, 1, 1, 32, 8, 128)),
        Case("decode, 256 rows, MHA 32, D 128", plain(_attend, 256, 256, 32, 32, 128)),
        Case("decode, window, cap, D 256", plain(_attend, 32, 32, 8, 4, 256, window=4096, cap=50.0)),
        Case("decode, window, sinks, GQA 64/8, D 64", plain(_attend, 32, 32, 64, 8, 64, window=128, sinks=True)),
        Case("decode, odd group 28/4, D 80", plain(_attend, 32, 32, 28, 4, 80)),
        Case("decode, fixed split", plain(_attend, 32, 32, 32, 8, 128, split_size=1024)),
        Case("decode, float32", plain(_attend, 32, 32, 32, 8, 128, dtype=F32)),
        Case("decode, float8 cache", lambda f: _attend(32, 32, 32, 8, 128, float8=f), float8=True, quick=True),
        Case("extend, GQA 32/8, D 128", plain(_attend, 4, 4096, 32, 8, 128), quick=True),
        Case("extend, window, cap, D 256", plain(_attend, 4, 4096, 8, 4, 256, window=4096, cap=50.0)),
        Case("extend, window, sinks, D 64", plain(_attend, 4, 4096, 64, 8, 64, window=128, sinks=True)),
        Case(
            "extend, draft tree",
            lambda _: _attend(8, 64, 32, 8, 128, tree_mask=t(64, 64, dtype=torch.uint8)),
        ),
        Case("extend, float32", plain(_attend, 4, 4096, 32, 8, 128, dtype=F32)),
        Case("extend, float8 cache", lambda f: _attend(4, 4096, 32, 8, 128, float8=f), float8=True),
        Case("decode, shared pages, 64 rows", plain(_attend, 64, 64, 32, 8, 128, shared=True), quick=True),
        Case("decode, shared pages, float8", lambda f: _attend(64, 64, 32, 4, 128, float8=f, shared=True), float8=True),
        Case(
            "decode, shared pages, sinks, D 64", plain(_attend, 64, 64, 64, 8, 64, window=128, sinks=True, shared=True)
        ),
        Case("decode, shared pages, cap, D 256", plain(_attend, 64, 64, 8, 4, 256, cap=50.0, shared=True)),
        Case("decode, shared pages, float32", plain(_attend, 8, 8, 32, 8, 128, dtype=F32, shared=True)),
        Case("extend, shared pages", plain(_attend, 64, 4096, 32, 8, 128, shared=True)),
        Case("MLA decode, DeepSeek-V3", plain(_mla, 32, 32)),
        Case("MLA extend, DeepSeek-V3", plain(_mla, 4, 2048)),
        Case("chosen keys, decode, 32 rows", plain(_sparse, 32, 32), quick=True),
        Case("chosen keys, 4 rows, 2048 tokens", plain(_sparse, 4, 2048), quick=True),
        Case("chosen keys, 16 heads of a rank", plain(_sparse, 4, 2048, BF16, 16)),
        Case("chosen keys, float32", plain(_sparse, 4, 300, F32)),
        Case("delta net, decode, 32 rows, 32 heads of 128", plain(_delta, 32, 32, False), quick=True),
        Case("Kimi delta, 4 rows, 2048 tokens", plain(_delta, 4, 2048, True), quick=True),
        Case("delta net, float32, 4 rows, 300 tokens, heads of 64 and 96", plain(_odd_delta), quick=True),
        Case("short convolution, 32 rows", plain(_short_conv)),
        Case("Mamba 2, decode, 32 rows, 80 heads, state 128", plain(_mamba2, 32, 32, 80, 1, 128), quick=True),
        Case("Mamba 2, 4 rows, 2048 tokens, 128 heads in 8 groups", plain(_mamba2, 4, 2048, 128, 8, 128), quick=True),
        Case("Mamba 2, 4 rows, 2048 tokens, state 256", plain(_mamba2, 4, 2048, 24, 1, 256)),
        Case("Mamba 2, float32, 4 rows, 300 tokens", plain(_mamba2, 4, 300, 24, 1, 128, F32)),
        Case("Mamba 1, decode, 32 rows, 8192 channels", plain(_mamba1, 32, 32, 8192), quick=True),
        Case("Mamba 1, 4 rows, 2048 tokens", plain(_mamba1, 4, 2048, 8192), quick=True),
        Case("Mamba 1, float32, 4 rows, 300 tokens", plain(_mamba1, 4, 300, 1536, F32)),
        Case("norms, bf16, 4096", plain(_norms, BF16, 4096), quick=True),
        Case("norms, float32, 2880", plain(_norms, F32, 2880)),
        Case("activations, sum, cap", plain(_elementwise)),
        Case("RoPE and KV write, halves", plain(_rope, False, BF16, False), quick=True),
        Case("RoPE and KV write, neighbours", plain(_rope, True, BF16, False)),
        Case("RoPE and KV write, float8", lambda f: _rope(False, f, True), float8=True),
        Case("rows and pages", plain(_pages)),
        Case("first and last tokens", plain(_tokens)),
        Case("sample, 128k", plain(_sample, 128256), quick=True),
        Case("penalties, bias, mask, log-sum-exp", plain(_logits, 151936)),
        Case("MoE, 1 token", plain(_moe, 1)),
        Case("MoE, routed by the first product", plain(_moe_op, 1), quick=True),
        Case("MoE, routed by the first product, 256 experts", plain(_moe_op, 4, 256, 10)),
        Case("MoE, 64 tokens", plain(_moe, 64), quick=True),
        Case("MoE, 4096 tokens", plain(_moe, 4096), quick=True),
        Case("MoE, float8, routed by the first product", _moe_op_float8, float8=True, quick=True),
        Case("MoE, float8, 1 token", lambda f: _moe(1, f), float8=True),
        Case("MoE, float8, 64 tokens", lambda f: _moe(64, f), float8=True),
        Case("MoE, float8, 4096 tokens", lambda f: _moe(4096, f), float8=True),
        Case("MoE, float8, scales of rows, 1 token", lambda f: _moe(1, f, True), float8=True),
        Case("MoE, float8, scales of rows, 64 tokens", lambda f: _moe(64, f, True), float8=True),
        Case("MoE, float8, scales of rows, 4096 tokens", lambda f: _moe(4096, f, True), float8=True),
        Case("gpt-oss experts, 1 token", plain(_clamped, 1)),
        Case("gpt-oss experts, 64 tokens", plain(_clamped, 64)),
        Case("gpt-oss experts, 4096 tokens", plain(_clamped, 4096)),
        Case("gpt-oss experts in mxfp4, 1 token", plain(_clamped, 1, _mxfp4), quick=True),
        Case("gpt-oss experts in mxfp4, 64 tokens", plain(_clamped, 64, _mxfp4)),
        Case("gpt-oss experts in mxfp4, 512 tokens", plain(_clamped, 512, _mxfp4)),
        Case("gpt-oss experts in mxfp4, 4096 tokens", plain(_clamped, 4096, _mxfp4), quick=True),
        Case("experts that scale their input, or have no gate, 1 token", plain(_odd_experts, 1)),
        Case("experts that scale their input, or have no gate, 2048 tokens", plain(_odd_experts, 2048)),
        Case("MoE, int4, 1 token", plain(_moe_int4, 1, 128, False)),
        Case("MoE, int4, 64 tokens", plain(_moe_int4, 64, 128, False), quick=True),
        Case("MoE, int4, 4096 tokens", plain(_moe_int4, 4096, 128, False)),
        Case("MoE, int4 in groups of 32 with zero points, 1 token", plain(_moe_int4, 1, 32, True)),
        Case("MoE, int4 in groups of 32 with zero points, 64 tokens", plain(_moe_int4, 64, 32, True)),
        Case("MoE, int4 in groups of 32 with zero points, 4096 tokens", plain(_moe_int4, 4096, 32, True)),
        Case("router, sigmoid, correction, 8 of 256", plain(_route, 256, 8, True, True)),
        Case("router that scores the chosen, 4 of 32, 1 of 16", lambda _: _late_router()),
        Case("router, 4 of 8 groups, 8 of 256", plain(_grouped_router)),
        Case("experts that were chosen elsewhere", plain(_chosen_experts)),
        Case("router, softmax without a sum of 1, 6 of 64", plain(_route, 64, 6, False, False)),
        Case("quantise to float8", _quantise, float8=True),
        Case("norm that writes float8", _norm_fp8, float8=True),
        Case("few rows on float8 weights", partial(_few_rows, BF16), float8=True),
        Case("few rows on float8 weights, float32", partial(_few_rows, F32), float8=True),
        Case("float8 GEMM, 1 token", partial(_gemm_fp8, 1), float8=True),
        Case("float8 GEMM, 128 tokens", partial(_gemm_fp8, 128), float8=True),
        Case("int4 GEMM, 1 token", plain(_gemm_int, 1)),
        Case("int4 GEMM, 64 tokens", plain(_gemm_int, 64)),
        Case("integers in groups, 1 token", plain(_grouped, 1, BF16, "Q4_K", "Q6_K", "Q8_0"), quick=True),
        Case("integers in groups, 1 token, every kind", plain(_grouped, 1, BF16, *narrow_gguf.KINDS, "rows", "zeros")),
        Case("integers in groups, 2 tokens", plain(_grouped, 2, BF16, *narrow_gguf.KINDS, "rows", "zeros")),
        Case("integers in groups, 4 tokens", plain(_grouped, 4, BF16, *narrow_gguf.KINDS, "rows", "zeros")),
        Case("integers in groups, 64 tokens", plain(_grouped, 64, BF16, "Q4_K", "Q6_K", "Q8_0"), quick=True),
        Case("integers in groups, 64 tokens, float32", plain(_grouped, 64, F32, "Q4_K", "Q6_K", "rows")),
        Case("integers in groups, 512 tokens", plain(_grouped, 512, BF16, *narrow_gguf.KINDS, "rows", "zeros")),
        Case("mxfp4 GEMM, 1, 64 and 2048 tokens", lambda _: _gemm_mxfp4()),
        Case("LoRA", plain(_lora)),
        Case("batch-invariant matmul", lambda _: invariant.product(t(64, 4096), t(6144, 4096), t(6144))),
    ]
