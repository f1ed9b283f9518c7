"""Automatic choices and the reasons they give."""

import pytest

from phloem.core import resolve
from phloem.core.config import CacheConfig
from phloem.core.errors import ConfigError
from phloem.core.resolve import Decision, MemoryFacts

FACTS = MemoryFacts(free=2**30, total=2**32, weights=2**28, bytes_per_token=2**14, default_fraction=0.5)


def test_more_threads_than_cores_are_taken_and_told_of() -> None:
    assert resolve.threads(None, 2).value == 2
    assert resolve.threads(2, 2) == Decision("threads", 2, "as asked")
    many = resolve.threads(99, 2)
    assert many.value == 99 and "more than the 2 cores" in many.reason


def test_a_longer_context_than_the_model_has_is_refused() -> None:
    assert resolve.context_length(None, 8192, 2**30).value == 8192
    assert resolve.context_length(100, 8192, 2**30).value == 100
    with pytest.raises(ConfigError, match="9000 is more than the 8192"):
        resolve.context_length(9000, 8192, 2**30)


def test_a_context_that_no_memory_holds_is_cut_and_refused_where_it_is_asked_for() -> None:
    cut = resolve.context_length(None, 2**31 - 1, 2**34)
    assert cut.value == 2**20 and "own limit is 2147483647" in cut.reason
    assert resolve.context_length(2**22, 2**31 - 1, 2**34).value == 2**22
    with pytest.raises(ConfigError, match="tables of 2147483647 positions do not fit in 16"):
        resolve.context_length(2**31 - 1, 2**31 - 1, 2**34)


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


GIB = 2**30
DEVICE = MemoryFacts(
    free=100 * GIB,
    total=141 * GIB,
    weights=16 * GIB,
    bytes_per_token=2**17,
    default_fraction=0.9,
    activations=3 * GIB,
    graphs=2 * GIB,
    reserve=4 * GIB,
    largest_step="steps of 8192 tokens, 256 rows",
)


def test_a_device_of_its_own_gives_the_pool_what_the_measured_parts_leave() -> None:
    decision = resolve.pool_tokens(CacheConfig(), DEVICE, 16, 131072, 256)
    assert decision.value == 91 * GIB // 2**17 - 16  # one page of it is scratch
    told = resolve.memory_parts(DEVICE, decision.value)
    assert told.value == "141.0 GiB"
    for part in ("weights 16.00", "activations 3.00 GiB (steps of 8192 tokens, 256 rows)", "graphs up to 2.00"):
        assert part in told.reason
    assert "reserve 4.00 GiB, KV 91.00 GiB (745456 tokens of 131072 bytes)" in told.reason


def test_what_the_user_says_wins_over_the_measurement() -> None:
    assert resolve.pool_tokens(CacheConfig(kv_memory="1GiB"), DEVICE, 16, 131072, 256).value == 8192
    assert resolve.pool_tokens(CacheConfig(max_total_tokens=700), DEVICE, 16, 131072, 256).value == 688
    half = resolve.pool_tokens(CacheConfig(mem_fraction_static=0.5), DEVICE, 16, 131072, 256)
    assert half.value == (58 - 16) * GIB // 2**17 and "0.5 of 116.0 GiB" in half.reason


def test_a_device_too_small_for_one_long_request_is_told_with_numbers() -> None:
    small = MemoryFacts(24 * GIB, 48 * GIB, 16 * GIB, 2**17, 0.9, 3 * GIB, 2 * GIB, 4 * GIB, "steps of 8192 tokens")
    with pytest.raises(ConfigError) as raised:
        resolve.pool_tokens(CacheConfig(), small, 16, 131072, 256)
    text = raised.value.message
    assert raised.value.param == "context_length"
    assert "context_length 131072 needs 16.00 GiB" in text and "15.00 GiB are left of 48.00 GiB" in text
    assert "to at most 122864" in text and "chunked_prefill_size" in text
    assert resolve.pool_tokens(CacheConfig(), small, 16, 122864, 256).value == 122864
    full = MemoryFacts(8 * GIB, 48 * GIB, 16 * GIB, 2**17, 0.9, 3 * GIB, 2 * GIB, 4 * GIB)
    with pytest.raises(ConfigError, match=r"0\.00 GiB are left.*: lower chunked_prefill_size"):
        resolve.pool_tokens(CacheConfig(), full, 16, 131072, 256)


def test_cache_slots_stay_int32() -> None:
    huge = MemoryFacts(100 * GIB, 141 * GIB, 0, 16, 0.9, 0)
    assert 2**31 - 64 < resolve.pool_tokens(CacheConfig(), huge, 16, 1024, 8).value < 2**31 - 16


def test_shared_memory_is_told_in_the_same_form() -> None:
    told = resolve.memory_parts(FACTS, 800)
    assert told.reason.startswith(
        "weights 0.25 GiB, KV 0.01 GiB (800 tokens of 16384 bytes); activations, not measured"
    )


def test_graphs_have_a_bound() -> None:
    assert resolve.graph_budget(141 * GIB) == 4 * GIB and resolve.graph_budget(24 * GIB) == 768 * 2**20
