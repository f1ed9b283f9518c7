"""KV storage by page."""

from __future__ import annotations

import pytest
import torch

from phloem.kvcache.pool import KVPool
from phloem.layers.context import AttentionSpec

CPU = torch.device("cpu")
SPECS = [AttentionSpec(0, 4, 2, 8, 1.0), AttentionSpec(1, 4, 1, 16, 1.0, window=4)]


def test_shapes_follow_each_layers_spec() -> None:
    pool = KVPool(SPECS, 5, 4, torch.bfloat16, CPU)
    assert [tuple(cache.shape) for cache in pool.keys] == [(5, 2, 4, 8), (5, 1, 4, 16)]
    assert [tuple(cache.shape) for cache in pool.values] == [(5, 2, 4, 8), (5, 1, 4, 16)]
    assert all(not cache.any() for cache in pool.keys + pool.values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_bytes_per_token_is_what_is_allocated(dtype: torch.dtype) -> None:
    pool = KVPool(SPECS, 5, 4, dtype, CPU)
    assert KVPool.bytes_per_token(SPECS, dtype) * 5 * 4 == pool.nbytes


def test_int8_entries_carry_their_scale() -> None:
    assert KVPool(SPECS, 2, 4, torch.int8, CPU).keys[0].shape[-1] == 8 + 4


@pytest.mark.parametrize(("pages", "size"), [(1, 4), (5, 0)])
def test_too_small(pages: int, size: int) -> None:
    with pytest.raises(ValueError, match="at least"):
        KVPool(SPECS, pages, size, torch.float32, CPU)


def test_layers_must_be_numbered_without_holes() -> None:
    with pytest.raises(ValueError, match="numbered"):
        KVPool([SPECS[1]], 3, 4, torch.float32, CPU)
