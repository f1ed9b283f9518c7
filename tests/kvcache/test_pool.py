"""KV storage by page."""

from __future__ import annotations

import pytest
import torch

from phloem.core.errors import ConfigError
from phloem.core.memory import Latent, Paged, State
from phloem.kvcache.pool import KVPool

CPU = torch.device("cpu")
SPECS = [Paged(2, 8, 8), Paged(1, 16, 16, window=4)]
MIXED = [*SPECS, Latent(12, 4), State((((3, 5), "float32"), ((7,), "bfloat16")))]


def test_shapes_follow_each_layers_spec() -> None:
    pool = KVPool(SPECS, (5, 3), 4, torch.bfloat16, CPU)
    assert [tuple(cache.shape) for cache in pool.keys] == [(5, 2, 4, 8), (3, 1, 4, 16)]
    assert [tuple(cache.shape) for cache in pool.values] == [(5, 2, 4, 8), (3, 1, 4, 16)]
    assert all(not cache.any() for cache in pool.keys + pool.values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_bytes_per_token_is_what_is_allocated(dtype: torch.dtype) -> None:
    pool = KVPool(SPECS, (5, 3), 4, dtype, CPU)
    full, window = KVPool.bytes_per_token(SPECS, dtype)
    assert full * 5 * 4 + window * 3 * 4 == pool.nbytes


def test_int8_entries_carry_their_scale() -> None:
    assert KVPool(SPECS, (2, 2), 4, torch.int8, CPU).keys[0].shape[-1] == 8 + 4


@pytest.mark.parametrize(("pages", "size"), [(1, 4), (5, 0)])
def test_too_small(pages: int, size: int) -> None:
    with pytest.raises(ValueError, match="at least"):
        KVPool(SPECS, (5, pages), size, torch.float32, CPU)


def test_each_group_needs_a_number_of_pages() -> None:
    with pytest.raises(ValueError, match="2 groups"):
        KVPool(SPECS, (5,), 4, torch.float32, CPU)


def test_kinds_of_memory_lie_side_by_side() -> None:
    pool = KVPool(MIXED, (5, 3, 4), 4, torch.bfloat16, CPU)
    assert [pool.group_of[layer] for layer in range(4)] == [0, 1, 0, 2]
    latent = pool.keys[2]
    assert tuple(latent.shape) == (5, 1, 4, 16) and tuple(pool.values[2].shape) == (5, 1, 4, 12)
    latent[2, 0, 3, 11] = 7
    assert pool.values[2][2, 0, 3, 11] == 7 and pool.values[2].data_ptr() == latent.data_ptr()
    assert [tuple(tensor.shape) for tensor in pool.states[3]] == [(4, 3, 5), (4, 7)]
    assert [tensor.dtype for tensor in pool.states[3]] == [torch.float32, torch.bfloat16]
    assert not pool.states[0] and not pool.keys[3].numel()
    full, window, slot = KVPool.bytes_per_token(MIXED, torch.bfloat16)
    assert (full, window, slot) == (2 * 2 * 8 * 2 + 16 * 2, 2 * 16 * 2, 15 * 4 + 7 * 2)
    assert pool.nbytes == full * 5 * 4 + window * 3 * 4 + slot * 4


def test_a_latent_has_no_int8_form_and_says_so() -> None:
    with pytest.raises(ConfigError, match="int8"):
        KVPool(MIXED, (5, 3, 4), 4, torch.int8, CPU)


def test_resident_bytes_keep_to_the_limit() -> None:
    pool = KVPool(MIXED, (500, 300, 4), 16, torch.float32, CPU)
    assert 0 <= pool.make_resident(1 << 16, lambda: False) <= 1 << 16
    assert pool.make_resident(1 << 30, lambda: True) == 0
