"""AVX-VNNI on a processor that has it: its products are other instructions than AVX2's, and its results AVX2's bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import int8_pages
import pytest
import torch
from linear_cases import GGUF_TYPES, levels, make_source

from phloem.kernels import native
from phloem.kernels.ops import AttentionCall, Ops, PagedBatch

pytestmark = pytest.mark.skipif("avxvnni" not in levels(), reason="needs AVX-VNNI, and a compiler that knows it")
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    yield
    native.table(2, None)


def both(run: Callable[[Ops], list[torch.Tensor]]) -> None:
    """The same of both levels, with two threads; what is no number counts as what it is."""
    want, got = run(native.table(2, "avx2")), run(native.table(2, "avxvnni"))
    assert native.runtime().library.level() == "avxvnni"
    assert len(got) == len(want) and all(torch.equal(a, b) for a, b in zip(want, got, strict=True))
    assert not any(result.isnan().any() for result in got)


@pytest.mark.parametrize("kind", [*GGUF_TYPES, "dense"])
def test_linear_layers(kind: str) -> None:
    """Odd numbers of outputs, few rows and many, and activations as large as bytes hold."""
    source, head = (make_source(kind, outputs, 2 if kind[-1:] == "K" else 10, 3) for outputs in (75, 1003))
    x = torch.randn(70, source.shape[1], generator=torch.Generator().manual_seed(4))
    x[2], x[3] = 1.0, -1.0

    def run(ops: Ops) -> list[torch.Tensor]:
        packed, tall = (ops.prepare_linear([each], torch.bfloat16, CPU) for each in (source, head))
        found = [ops.linear(x[:rows], packed)[0] for rows in (1, 2, 4, 5, 8, 17, 33, 70)]
        return [*found, ops.linear_argmax(x[:3], tall)]

    both(run)


@pytest.mark.parametrize("kind", ["Q4_1", "Q6_K", "Q8_0"])
def test_experts(kind: str) -> None:
    n = 256 if kind[-1] == "K" else 96
    up, down = ([make_source(kind, n, n // (256 if n == 256 else 32), e) for e in range(count)] for count in (6, 3))
    x, logits = torch.randn(40, n), torch.randn(40, 3)

    def run(ops: Ops) -> list[torch.Tensor]:
        packed = [ops.prepare_experts(parts, torch.bfloat16, CPU, 3) for parts in (up, down)]
        return [ops.moe(x[:rows], logits[:rows], *packed, 2, True) for rows in (1, 7, 40)]

    both(run)


@pytest.mark.parametrize("heads", [9, 2])
def test_attention_over_bytes(heads: int) -> None:
    """Rows of one token and of many, beside int8 pages, with a window and without."""
    queries, lengths, kv_heads, size, page = [1, 40, 1], [300, 97, 1], heads // 4 + 1, 64, 16
    counts = [-(-length // page) for length in lengths]
    table = torch.zeros(len(lengths), max(counts), dtype=torch.int32)
    for row, count in enumerate(counts):
        table[row, :count] = torch.arange(count) + sum(counts[:row]) + 1
    start = torch.tensor([0, 1, 41, 42], dtype=torch.int32)
    slots = torch.zeros(sum(queries), dtype=torch.int32)
    batch = PagedBatch(start, torch.tensor(lengths, dtype=torch.int32), table, slots, max(queries), max(lengths))
    caches = []
    for keys in (True, False):
        values = torch.randn(sum(counts) + 1, kv_heads, page, size)
        scale = values.abs().amax(-1, keepdim=True) / 127
        caches.append(int8_pages.pack((values / scale).round(), scale, keys))
    q = torch.randn(sum(queries), heads, size)

    def run(ops: Ops) -> list[torch.Tensor]:
        calls = (AttentionCall(size**-0.5), AttentionCall(size**-0.5, 50))
        return [ops.paged_attention(q, tuple(caches), batch, call) for call in calls]

    both(run)
