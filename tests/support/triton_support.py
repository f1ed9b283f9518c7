"""Shared by the tests of the Triton kernels, which run under its interpreter (see test_triton.py)."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Generator

import pytest
import torch

from phloem.kernels.ops import PagedBatch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = [torch.float32, torch.float16]


def need_interpreter() -> None:
    """The interpreter has to be on before Triton is imported, so these modules run in a process of their own."""
    if not INTERPRETED:
        pytest.skip("runs under the Triton interpreter, from test_triton.py", allow_module_level=True)


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    return {torch.float32: {"atol": 2e-5, "rtol": 2e-5}, torch.float16: {"atol": 4e-3, "rtol": 4e-3}}[dtype]


def assert_close(got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype) -> None:
    torch.testing.assert_close(got.float(), want.float(), **tolerance(dtype))


def paged(
    query_lens: list[int],
    seq_lens: list[int],
    page_size: int,
    kv_heads: int,
    head: int,
    dtype: torch.dtype,
    head_v: int | None = None,
) -> tuple[PagedBatch, torch.Tensor, torch.Tensor]:
    """A batch whose rows lie on scattered pages, and caches full of random numbers (unused pages of NaN)."""
    rows, width = len(seq_lens), max(-(-length // page_size) for length in seq_lens)
    pages = rows * width + 3
    table = (torch.randperm(pages - 1)[: rows * width] + 1).view(rows, width).int()
    k_cache = torch.full((pages, kv_heads, page_size, head), float("nan"), dtype=dtype)
    v_cache = torch.full((pages, kv_heads, page_size, head_v or head), float("nan"), dtype=dtype)
    slots: list[int] = []
    for row, length in enumerate(seq_lens):
        for position in range(length):
            page, offset = int(table[row, position // page_size]), position % page_size
            k_cache[page, :, offset] = torch.randn(kv_heads, head).to(dtype)
            v_cache[page, :, offset] = torch.randn(kv_heads, head_v or head).to(dtype)
            if position >= length - query_lens[row]:
                slots.append(page * page_size + offset)
    start = torch.tensor([0, *query_lens]).cumsum(0).int()
    batch = PagedBatch(
        start, torch.tensor(seq_lens).int(), table, torch.tensor(slots).int(), max(query_lens), max(seq_lens)
    )
    return batch, k_cache, v_cache


@contextlib.contextmanager
def filled_with_nan() -> Generator[None]:
    """What is allocated and not written is NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
