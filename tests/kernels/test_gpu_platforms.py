"""Platforms and attention backends of GPUs, on a machine that has none: who declines and why, what would be called."""

from __future__ import annotations

import sys
import types
from dataclasses import replace
from typing import Any

import pytest
import torch
from pools import pool_of

from phloem.attention import AttentionNeed, flash, flashinfer, reference, triton
from phloem.attention import cpu as cpu_attention
from phloem.core.errors import ConfigError
from phloem.kernels import reference as ref
from phloem.kernels import reference_attention
from phloem.kernels.ops import AttentionCall, Ops, PagedBatch, Rotation
from phloem.kvcache.pool import KVPool
from phloem.layers.context import AttentionSpec, Heads
from phloem.platforms import cuda, rocm, xpu

CPU, GPU = torch.device("cpu"), torch.device("cuda")
SPEC = AttentionSpec(0, 8, 2, 64, 0.125)


def need(**changes: Any) -> AttentionNeed:
    return AttentionNeed(**{"specs": [SPEC], "kv_dtype": torch.bfloat16, "device": GPU, **changes})


@pytest.mark.parametrize("module", [cuda, rocm, xpu])
def test_a_platform_that_is_not_here_says_so(module: types.ModuleType) -> None:
    available, reason = module.is_available()
    assert available or len(reason) > 15


def test_choosing_a_gpu_that_is_not_here_is_a_clear_error() -> None:
    from phloem import platforms

    if rocm.is_available()[0]:
        pytest.skip("there is an AMD GPU")
    with pytest.raises(ConfigError, match="'rocm' is not available: this torch"):
        platforms.choose("rocm", None)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.cuda as on a Hopper machine, as far as the platform asks."""
    props = types.SimpleNamespace(
        name="NVIDIA H200", total_memory=141 * 2**30, major=9, minor=0, multi_processor_count=132
    )
    for name, value in {
        "is_available": lambda: True,
        "current_device": lambda: 0,
        "get_device_properties": lambda index: props,
        "get_device_capability": lambda device: (9, 0),
        "mem_get_info": lambda device: (100 * 2**30, 141 * 2**30),
        "memory_reserved": lambda device: 5 * 2**30,
        "memory_allocated": lambda device: 3 * 2**30,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.version, "hip", None)


@pytest.mark.usefixtures("gpu")
def test_cuda_platform() -> None:
    assert cuda.is_available() == (True, "NVIDIA H200, 141 GiB, compute capability 9.0")
    platform = cuda.Platform(None)
    assert platform.device == torch.device("cuda:0")
    assert platform.memory() == (102 * 2**30, 141 * 2**30)
    assert platform.dtype(None)[0] == torch.bfloat16 and platform.dtype("float16")[0] == torch.float16
    assert platform.attention_backends()[0] == "triton"


@pytest.mark.usefixtures("gpu")
def test_tables() -> None:
    pytest.importorskip("triton")
    platform = cuda.Platform(None)
    ops, why = platform.table(None)
    assert ops.name == "triton" and "Triton" in why and ops.recorder is not None
    assert platform.table("invariant")[0].name == "invariant"
    assert platform.table("reference")[0].name == "reference"
    with pytest.raises(ConfigError, match="not one of triton, invariant, reference"):
        platform.table("native")


@pytest.mark.usefixtures("gpu")
def test_without_triton_torch_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda.importlib.util, "find_spec", lambda name: None)
    ops, why = cuda.triton_table(None)
    assert ops.name == "reference" and "not installed" in why
    with pytest.raises(ConfigError, match="Triton is not installed"):
        cuda.triton_table("triton")


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("module", "changes", "reason"),
    [
        (triton, {"device": CPU}, "runs on GPUs, not on cpu"),
        (triton, {"kv_dtype": torch.int8}, "no KV cache of type torch.int8"),
        (triton, {"specs": [AttentionSpec(0, 8, 2, 512, 1.0)]}, "heads of 512"),
        (flash, {"device": CPU}, "not on cpu"),
        (flash, {}, "flash_attn_interface"),
        (flashinfer, {"device": CPU}, "not on cpu"),
        (flashinfer, {}, "flashinfer is not installed"),
    ],
)
def test_backends_decline_with_a_reason(module: Any, changes: dict[str, Any], reason: str) -> None:
    backend = module.Backend(Ops(), [SPEC], GPU, torch.bfloat16)
    declined = backend.decline(need(**changes))
    assert declined is not None and reason in declined


@pytest.mark.usefixtures("gpu")
def test_triton_accepts() -> None:
    pytest.importorskip("triton")
    for kv_dtype in (torch.bfloat16, torch.float8_e4m3fn):
        assert triton.Backend(Ops(), [SPEC], GPU, kv_dtype).decline(need(kv_dtype=kv_dtype)) is None


def _install(monkeypatch: pytest.MonkeyPatch, name: str, **contents: Any) -> None:
    module = types.ModuleType(name)
    module.__dict__.update(contents)
    module.__spec__ = types.SimpleNamespace(name=name)  # type: ignore[assignment]
    monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.usefixtures("gpu")
def test_flash_wants_hopper_and_16_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    _install(monkeypatch, "flash_attn_interface")
    backend = flash.Backend(Ops(), [SPEC], GPU, torch.bfloat16)
    assert backend.decline(need()) is None
    assert "float8" in (backend.decline(need(kv_dtype=torch.float8_e4m3fn)) or "")
    with_sinks = need(specs=[SPEC, replace(SPEC, pool=1, sinks=True)])
    assert with_sinks.sinks and not need().sinks and backend.decline(with_sinks) == "has no attention sinks"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    assert "this GPU has 10.0" in (backend.decline(need()) or "")


@pytest.mark.usefixtures("gpu")
def test_flashinfer_head_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    _install(monkeypatch, "flashinfer")
    backend = flashinfer.Backend(Ops(), [SPEC], GPU, torch.bfloat16)
    assert backend.decline(need()) is None
    assert "heads of 80" in (backend.decline(need(specs=[AttentionSpec(0, 8, 2, 80, 1.0)])) or "")


def _step(
    query_lens: list[int], seq_lens: list[int], spec: AttentionSpec
) -> tuple[PagedBatch, KVPool, list[torch.Tensor]]:
    torch.manual_seed(0)
    rows, width = len(seq_lens), -(-max(seq_lens) // 4)
    pool = pool_of([spec], rows * width + 1, 4, torch.float32, CPU)
    pool.keys[0].normal_(), pool.values[0].normal_()
    table = (torch.randperm(rows * width) + 1).view(rows, width).int()
    slots = [
        int(table[row, position // 4]) * 4 + position % 4
        for row, (new, length) in enumerate(zip(query_lens, seq_lens, strict=True))
        for position in range(length - new, length)
    ]
    start = torch.tensor([0, *query_lens]).cumsum(0).int()
    lens = torch.tensor(seq_lens).int()
    batch = PagedBatch(start, lens, table, torch.tensor(slots).int(), max(query_lens), max(seq_lens))
    shapes = ((sum(query_lens), spec.heads, 64), *[(sum(query_lens), spec.kv_heads, 64)] * 2)
    return batch, pool, [torch.randn(shape) for shape in shapes]


def _turn(q: torch.Tensor, k: torch.Tensor) -> tuple[Rotation, torch.Tensor, torch.Tensor]:
    """A rotation of a step's tokens, and what it makes of q and k."""
    turn = Rotation(torch.arange(len(q)), torch.randn(len(q), 2, 32))
    turned = q.clone(), k.clone()
    ref.rope_(*turned, turn.positions, turn.cos_sin, False)
    return turn, *turned


def _has_written(pool: KVPool, batch: PagedBatch, k: torch.Tensor) -> bool:
    keys = pool.keys[0].clone()
    ref.write_kv(k, k, keys, keys.clone(), batch.token_slots)
    return torch.equal(keys, pool.keys[0])


class FakeWrapper:
    """FlashInfer's wrappers by their documented arguments, computing with the reference from those alone."""

    made = 0

    def __init__(self, workspace: torch.Tensor, layout: str, **options: Any) -> None:
        assert layout == "HND" and workspace.dtype == torch.uint8
        FakeWrapper.made += 1
        self.decode = "use_tensor_cores" in options

    def plan(self, *positional: Any, **common: Any) -> None:
        if self.decode:
            bounds, indices, last, *sizes = positional
            start = torch.arange(len(bounds)).int()
        else:
            start, bounds, indices, last, *sizes = positional
            assert common.pop("causal") is True
        assert not bounds.is_cuda and len(indices) == bounds[-1]
        self.page, self.common = sizes[3], common
        counts = bounds.diff()
        table = torch.zeros(len(counts), int(counts.max()), dtype=torch.int32)
        for row, count in enumerate(counts.tolist()):
            table[row, :count] = indices[bounds[row] : bounds[row + 1]]
        lens = ((counts - 1) * self.page + last).int()
        self.batch = PagedBatch(start, lens, table, torch.zeros(0), int(start.diff().max()), int(lens.max()))

    def run(
        self,
        q: torch.Tensor,
        cache: tuple[torch.Tensor, torch.Tensor],
        sinks: torch.Tensor | None = None,
        k_scale: float | None = None,
        v_scale: float | None = None,
    ) -> torch.Tensor:
        window = self.common["window_left"] + 1
        scale = self.common["sm_scale"] * (k_scale or 1.0)
        arguments = (scale, window, self.common["logits_soft_cap"], sinks)
        return reference_attention.paged_attention(q, cache, self.batch, AttentionCall(*arguments)) * (v_scale or 1.0)


@pytest.mark.parametrize("queries", [[1, 1, 1], [3, 1, 6]])
def test_flashinfer_is_told_the_scales_of_a_float8_cache(monkeypatch: pytest.MonkeyPatch, queries: list[int]) -> None:
    _install(
        monkeypatch,
        "flashinfer",
        BatchDecodeWithPagedKVCacheWrapper=FakeWrapper,
        BatchPrefillWithPagedKVCacheWrapper=FakeWrapper,
    )
    batch, pool, (q, k, v) = _step(queries, [9, 4, 13], SPEC)
    pools = [
        pool_of([SPEC], pool.num_pages[0], 4, torch.float8_e4m3fn, CPU, {0: ([15.0], [30.0])}),
        pool_of([SPEC], pool.num_pages[0], 4, torch.float32, CPU),
    ]
    for made in pools:
        by = (15.0, 30.0) if made.scales else (1.0, 1.0)
        made.keys[0].copy_(pool.keys[0] * 500 / by[0]), made.values[0].copy_(pool.values[0] * 900 / by[1])
    inputs = (q / 500, k * 500, v * 900)  # far beyond 448
    got = flashinfer.Backend(Ops(), [SPEC], CPU, torch.float8_e4m3fn).begin(batch, pools[0])(SPEC, Heads(*inputs))
    want = reference.Backend(Ops(), [SPEC], CPU, torch.float32).begin(batch, pools[1])(SPEC, Heads(*inputs))
    assert (got - want).norm() / want.norm() < 0.1


@pytest.mark.usefixtures("gpu")
def test_who_knows_no_scales_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    _install(monkeypatch, "flashinfer")
    fp8 = {"kv_dtype": torch.float8_e4m3fn, "kv_scales": 2}
    per_head = flashinfer.Backend(Ops(), [SPEC], GPU, torch.float8_e4m3fn).decline(need(**fp8))
    assert "one scale of the KV cache per layer" in (per_head or "")
    assert triton.Backend(Ops(), [SPEC], GPU, torch.float8_e4m3fn).decline(need(**fp8)) is None
    invariant = triton.Backend(Ops(name="invariant"), [SPEC], GPU, torch.float8_e4m3fn).decline(need(**fp8))
    assert "know no scales" in (invariant or "")
    on_cpu = cpu_attention.Backend(Ops(), [SPEC], CPU, torch.float8_e4m3fn).decline(need(**fp8, device=CPU))
    assert "float8_e4m3fn" in (on_cpu or "")


@pytest.mark.slow
@pytest.mark.parametrize("queries", [[1, 1, 1], [3, 1, 6]])
@pytest.mark.parametrize("spec", [SPEC, AttentionSpec(0, 2, 2, 64, 0.3, window=5, softcap=4.0)])
def test_flashinfer_is_told_the_same_step(
    monkeypatch: pytest.MonkeyPatch, spec: AttentionSpec, queries: list[int]
) -> None:
    _install(
        monkeypatch,
        "flashinfer",
        BatchDecodeWithPagedKVCacheWrapper=FakeWrapper,
        BatchPrefillWithPagedKVCacheWrapper=FakeWrapper,
    )
    batch, pool, (q, k, v) = _step(queries, [9, 4, 13], spec)
    sinks = torch.randn(spec.heads) if spec.window else None
    backend = flashinfer.Backend(Ops(), [spec], CPU, torch.float32)
    FakeWrapper.made = 0
    turn, turned_q, turned_k = _turn(q, k)
    for _ in range(2):
        step = backend.begin(batch, pool)
        step(spec, Heads(q, k, v, sinks))
        got = step(spec, Heads(q.clone(), k.clone(), v, sinks, turn))
    assert FakeWrapper.made == 1 and _has_written(pool, batch, turned_k)
    q = turned_q
    want = reference_attention.paged_attention(
        q, (pool.keys[0], pool.values[0]), batch, AttentionCall(spec.scale, spec.window, spec.softcap, sinks)
    )
    torch.testing.assert_close(got, want)


def test_flash_is_told_the_same_step(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = AttentionSpec(0, 4, 2, 64, 0.3, window=5, softcap=4.0)
    batch, pool, (q, k, v) = _step([3, 1], [9, 4], spec)

    def attend(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, **given: Any) -> torch.Tensor:
        assert keys.shape[1] == 4 and keys.data_ptr() == pool.keys[0].data_ptr() and given["causal"]
        told = PagedBatch(
            given["cu_seqlens_q"], given["cache_seqlens"], given["page_table"], torch.zeros(0), given["max_seqlen_q"], 9
        )
        window = given["window_size"][0] + 1
        return reference_attention.paged_attention(
            q,
            (keys.transpose(1, 2), values.transpose(1, 2)),
            told,
            AttentionCall(given["softmax_scale"], window, given["softcap"]),
        )

    _install(monkeypatch, "flash_attn_interface", flash_attn_with_kvcache=attend)
    turn, turned_q, turned_k = _turn(q, k)
    got = flash.Backend(Ops(), [spec], CPU, torch.float32).begin(batch, pool)(spec, Heads(q, k, v, None, turn))
    assert torch.equal(q, turned_q) and _has_written(pool, batch, turned_k)
    want = reference_attention.paged_attention(q, (pool.keys[0], pool.values[0]), batch, AttentionCall(0.3, 5, 4.0))
    torch.testing.assert_close(got, want)
