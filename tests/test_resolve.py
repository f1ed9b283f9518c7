"""Automatic choices and the reasons they give."""

import pytest

from phloem.core import resolve
from phloem.core.config import CacheConfig
from phloem.core.errors import ConfigError
from phloem.core.resolve import MemoryFacts

FACTS = MemoryFacts(free=2**30, total=2**32, weights=2**28, bytes_per_token=2**14, default_fraction=0.5)


def test_a_longer_context_than_the_model_has_is_refused() -> None:
    assert resolve.context_length(None, 8192).value == 8192
    assert resolve.context_length(100, 8192).value == 100
    with pytest.raises(ConfigError, match="9000 is more than the 8192"):
        resolve.context_length(9000, 8192)


def test_the_pool_is_a_fraction_of_memory_less_the_weights() -> None:
    decision = resolve.pool_tokens(CacheConfig(), FACTS, 16, 10**6, 10**6)
    assert decision.value == (int((2**30 + 2**28) * 0.5) - 2**28) // 2**14 // 16 * 16
    assert "0.5 of 1.2 GiB" in decision.reason


def test_the_pool_is_no_larger_than_what_can_be_used() -> None:
    decision = resolve.pool_tokens(CacheConfig(), FACTS, 16, 100, 8)
    assert decision.value == 800
    assert "8 running requests of 100 tokens" in decision.reason


def test_bytes_and_tokens_override_the_fraction() -> None:
    assert resolve.pool_tokens(CacheConfig(kv_memory="16MiB"), FACTS, 16, 100, 8).value == 1024
    assert resolve.pool_tokens(CacheConfig(max_total_tokens=1000), FACTS, 16, 100, 8).value == 992


@pytest.mark.parametrize(
    "cache",
    [
        CacheConfig(max_total_tokens=10**9),
        CacheConfig(kv_memory="100GiB"),
        CacheConfig(kv_memory="1KiB"),
        CacheConfig(mem_fraction_static=0.1),
    ],
)
def test_a_pool_that_cannot_be_is_refused_with_numbers(cache: CacheConfig) -> None:
    with pytest.raises(ConfigError, match="free"):
        resolve.pool_tokens(cache, FACTS, 16, 10**6, 8)


def test_a_step_holds_a_token_of_every_running_request() -> None:
    assert resolve.chunk(None, 512, 1000).value == 1000
    assert resolve.chunk(None, 2048, 64).value == 2048
    assert resolve.chunk(100, 2048, 64).value == 100
