"""Every attention backend in the registry against the reference op; choosing among them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pools import pool_of

from phloem import attention
from phloem.attention import BACKENDS, AttentionNeed, cpu
from phloem.attention import choose as choose_backend
from phloem.core.errors import ConfigError
from phloem.kernels import reference as ref
from phloem.kernels import reference_attention
from phloem.kernels.ops import AttentionCall, Ops, PagedBatch, Rotation
from phloem.kvcache.pool import KVPool
from phloem.layers.context import AttentionSpec, Heads

CPU = torch.device("cpu")
PAGE = 4


@dataclass
class Case:
    batch: PagedBatch
    pool: KVPool
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor


def paged_batch(rows: list[tuple[int, int]], page_size: int, num_pages: int) -> PagedBatch:
    """rows: (query_len, seq_len). Pages are dealt in a random order, none twice."""
    free = (torch.randperm(num_pages - 1) + 1).tolist()
    width = max(-(-length // page_size) for _, length in rows) + 1
    table = torch.zeros(len(rows), width, dtype=torch.int32)
    starts, slots = [0], []
    for row, (queries, length) in enumerate(rows):
        pages = [free.pop() for _ in range(-(-length // page_size))]
        table[row, : len(pages)] = torch.tensor(pages)
        slots += [pages[p // page_size] * page_size + p % page_size for p in range(length - queries, length)]
        starts.append(starts[-1] + queries)
    return PagedBatch(
        query_start=torch.tensor(starts, dtype=torch.int32),
        seq_lens=torch.tensor([length for _, length in rows], dtype=torch.int32),
        page_table=table,
        token_slots=torch.tensor(slots, dtype=torch.int32),
        max_query_len=max(queries for queries, _ in rows),
        max_seq_len=max(length for _, length in rows),
    )


def make_case(rows: list[tuple[int, int]], spec: AttentionSpec, dtype: torch.dtype = torch.float32) -> Case:
    pages = sum(-(-length // PAGE) for _, length in rows) + 3
    pool = pool_of([dataclasses.replace(spec, pool=0)], pages, PAGE, dtype, CPU)
    pool.keys[0].normal_()
    pool.values[0].normal_()
    tokens = sum(queries for queries, _ in rows)
    q = torch.randn(tokens, spec.heads, spec.head_size, dtype=dtype)
    k = torch.randn(tokens, spec.kv_heads, spec.head_size, dtype=dtype)
    return Case(paged_batch(rows, PAGE, pages), pool, q, k, torch.randn_like(k))


def expected(case: Case, spec: AttentionSpec, sinks: torch.Tensor | None) -> torch.Tensor:
    keys, values = case.pool.keys[0].clone(), case.pool.values[0].clone()
    ref.write_kv(case.k, case.v, keys, values, case.batch.token_slots)
    return reference_attention.paged_attention(
        case.q, (keys, values), case.batch, AttentionCall(spec.scale, spec.window, spec.softcap, sinks)
    )


def backend_named(name: str, spec: AttentionSpec, dtype: torch.dtype = torch.float32):
    need = AttentionNeed([spec], dtype, CPU)
    backend = BACKENDS.module(name).Backend(Ops(), [spec], CPU, dtype)
    reason = backend.decline(need)
    if reason:
        pytest.skip(reason)
    return backend


ROWS = {
    "decode": [(1, 1), (1, 9), (1, 4), (1, 33)],
    "prefill": [(7, 7), (3, 3), (16, 16)],
    "chunk": [(5, 12), (4, 40)],
    "mixed": [(1, 17), (9, 9), (1, 2), (6, 30), (1, 1), (2, 5)],
    "one": [(1, 1)],
}


@pytest.mark.parametrize("name", BACKENDS.names())
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())
@pytest.mark.parametrize(("window", "cap", "sinks"), [(0, 0, False), (5, 0, False), (0, 2.5, False), (6, 1.5, True)])
def test_backend_matches_reference(
    name: str, rows: list[tuple[int, int]], window: int, cap: float, sinks: bool
) -> None:
    torch.manual_seed(1)
    spec = AttentionSpec(0, 6, 2, 8, 0.3, window, cap)
    backend = backend_named(name, spec)
    case = make_case(rows, spec)
    extra = torch.randn(6) if sinks else None
    want = expected(case, spec, extra)
    out = backend.begin(case.batch, case.pool)(spec, Heads(case.q, case.k, case.v, extra))
    torch.testing.assert_close(out, want, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("name", BACKENDS.names())
@pytest.mark.parametrize("normed", [False, True])
def test_backend_rotates_before_it_writes(name: str, normed: bool) -> None:
    torch.manual_seed(6)
    spec = AttentionSpec(0, 6, 2, 8, 0.3)
    backend = backend_named(name, spec)
    case = make_case(ROWS["mixed"], spec)
    norms = (torch.rand(8) + 0.5, torch.rand(8) + 0.5, 1e-6) if normed else (None, None, 0.0)
    turn = Rotation(torch.randint(0, 30, (len(case.q),)), torch.randn(30, 2, 3), True, *norms)
    q, k = case.q.clone(), case.k.clone()
    if normed:
        q, k = ref.rms_norm(q, turn.q_norm, 1e-6), ref.rms_norm(k, turn.k_norm, 1e-6)
    ref.rope_(q, k, turn.positions, turn.cos_sin, True)
    want = expected(dataclasses.replace(case, q=q, k=k), spec, None)
    out = backend.begin(case.batch, case.pool)(spec, Heads(case.q, case.k, case.v, None, turn))
    torch.testing.assert_close(out, want, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("kept", [(torch.float32,), (torch.int8,)])
def test_the_fused_op_serves_where_the_table_keeps_such_a_cache(kept: tuple[torch.dtype, ...]) -> None:
    calls: list[str] = []

    def rope_write_kv(q, k, v, rotation, k_cache, v_cache, slots):
        calls.append("fused")
        ref.rope_(q, k, rotation.positions, rotation.cos_sin, rotation.interleaved)
        ref.write_kv(k, v, k_cache, v_cache, slots)
        return q

    spec = AttentionSpec(0, 4, 2, 8, 0.3)
    case = make_case([(1, 3), (2, 2)], spec)
    turn = Rotation(torch.arange(3), torch.randn(3, 2, 4))
    q, k = case.q.clone(), case.k.clone()
    ref.rope_(q, k, turn.positions, turn.cos_sin, False)
    want = expected(dataclasses.replace(case, q=q, k=k), spec, None)
    ops = dataclasses.replace(Ops(), rope_write_kv=rope_write_kv, kv_dtypes=kept)
    for name in ("reference", "cpu"):
        step = BACKENDS.module(name).Backend(ops, [spec], CPU, torch.float32).begin(case.batch, case.pool)
        out = step(spec, Heads(case.q.clone(), case.k.clone(), case.v, None, turn))
        torch.testing.assert_close(out, want, atol=2e-6, rtol=1e-5)
    assert len(calls) == (2 if torch.float32 in kept else 0)


@pytest.mark.parametrize("name", BACKENDS.names())
def test_backend_in_bfloat16(name: str) -> None:
    torch.manual_seed(2)
    spec = AttentionSpec(0, 4, 4, 16, 0.25)
    backend = backend_named(name, spec, torch.bfloat16)
    case = make_case(ROWS["mixed"], spec, torch.bfloat16)
    want = expected(case, spec, None)
    out = backend.begin(case.batch, case.pool)(spec, Heads(case.q, case.k, case.v))
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, want, atol=3e-2, rtol=3e-2)


@pytest.mark.parametrize("name", BACKENDS.names())
def test_what_earlier_owners_left_is_never_seen(name: str) -> None:
    """NaN in slots that belong to nobody, in the scratch page and in the tail of a row's last page."""
    torch.manual_seed(3)
    spec = AttentionSpec(0, 2, 1, 8, 0.3)
    backend = backend_named(name, spec)
    rows = [(1, 6), (5, 5), (1, 23)]
    case = make_case(rows, spec)
    seen = torch.zeros(case.pool.num_pages[0], PAGE, dtype=torch.bool)
    for row, (_, length) in enumerate(rows):
        for position in range(length):
            seen[case.batch.page_table[row, position // PAGE], position % PAGE] = True
    want = expected(case, spec, None)
    for cache in (case.pool.keys[0], case.pool.values[0]):
        cache.masked_fill_(~seen[:, None, :, None], float("nan"))
    out = backend.begin(case.batch, case.pool)(spec, Heads(case.q, case.k, case.v))
    torch.testing.assert_close(out, want, atol=2e-6, rtol=1e-5)


def test_long_prefill_is_cut_into_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(4)
    monkeypatch.setattr(cpu, "QUERY_BLOCK", 8)
    monkeypatch.setattr(cpu, "GROUP_CELLS", 300)
    for window in (0, 5):
        spec = AttentionSpec(0, 4, 2, 8, 0.3, window)
        case = make_case([(30, 47), (21, 21), (1, 9), (8, 8)], spec)
        want = expected(case, spec, None)
        groups = cpu.plan(case.batch, PAGE, window)
        assert len(groups) > 3
        assert max(group.mask_nQL.shape[1] for group in groups) == 8
        if window:  # pages before the window are not even gathered
            assert max(group.mask_nQL.shape[2] for group in groups) <= 8 + 5 + 2 * PAGE
        out = cpu.GatheredStep(Ops(), case.batch, case.pool)(spec, Heads(case.q, case.k, case.v))
        torch.testing.assert_close(out, want, atol=2e-6, rtol=1e-5)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 12), st.integers(0, 30)), min_size=1, max_size=6),
    st.sampled_from([0, 1, 3, 9]),
    st.integers(0, 1000),
)
def test_any_mixture_of_rows(rows: list[tuple[int, int]], window: int, seed: int) -> None:
    torch.manual_seed(seed)
    spec = AttentionSpec(0, 4, 2, 8, 0.3, window)
    case = make_case([(queries, queries + prefix) for queries, prefix in rows], spec)
    want = expected(case, spec, None)
    out = cpu.GatheredStep(Ops(), case.batch, case.pool)(spec, Heads(case.q, case.k, case.v))
    torch.testing.assert_close(out, want, atol=2e-6, rtol=1e-5)


def test_equal_decode_rows_share_one_call() -> None:
    batch = paged_batch([(1, 40 + row) for row in range(16)], PAGE, 400)
    groups = cpu.plan(batch, PAGE, 0)
    assert [len(group.pages_nP) for group in groups] == [16]


def test_cpu_uses_the_tables_own_kernel() -> None:
    calls: list[int] = []

    def attend(*args: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return reference_attention.paged_attention(*args)

    spec = AttentionSpec(0, 4, 2, 8, 0.3)
    ops = dataclasses.replace(Ops(), paged_attention=attend)
    case = make_case([(1, 3)], spec)
    backend = choose_backend(["cpu"], AttentionNeed([spec], torch.float32, CPU), ops).backend
    want = expected(case, spec, None)
    torch.testing.assert_close(backend.begin(case.batch, case.pool)(spec, Heads(case.q, case.k, case.v)), want)
    assert calls == [1]


def test_choose_takes_the_first_that_accepts_and_says_why() -> None:
    spec = AttentionSpec(0, 4, 2, 8, 0.3)
    choice = choose_backend(["cpu", "reference"], AttentionNeed([spec], torch.float32, torch.device("meta")), Ops())
    assert choice.backend.name == "reference"
    assert choice.declined == {"cpu": "runs on CPU tensors, not on meta"}
    assert choose_backend(["cpu", "reference"], AttentionNeed([spec], torch.float32, CPU), Ops()).backend.name == "cpu"


def test_backends_that_no_platform_names_are_asked_before_the_last_resort() -> None:
    others = ["flash", "flashinfer", "pallas", "triton"]
    assert attention.with_others(["cpu", "reference"]) == ["cpu", *others, "reference"]
    assert attention.with_others(["reference"])[-1] == "reference"


def test_choose_refuses() -> None:
    spec = AttentionSpec(0, 4, 2, 8, 0.3)
    need = AttentionNeed([spec], torch.float32, torch.device("meta"))
    with pytest.raises(ConfigError, match="cpu: runs on CPU tensors, not on meta"):
        choose_backend(["reference"], need, Ops(), named="cpu")
    with pytest.raises(ConfigError, match=r"unknown attention backend 'cpuu'.*did you mean 'cpu'"):
        choose_backend(["reference"], need, Ops(), named="cpuu")
    with pytest.raises(ConfigError, match=r"no attention backend accepts.*int8.*int8"):
        choose_backend(["cpu", "reference"], AttentionNeed([spec], torch.int8, CPU), Ops())
