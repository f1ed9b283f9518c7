"""Which worker is chosen, and that the choice is right: by work, by what is cached, by session, by name."""

from __future__ import annotations

import random
import time
from typing import Any

import msgspec
import pytest

from phloem.core.errors import BadRequest, ConfigError
from phloem.router.address import parse_url
from phloem.router.ask import PIECE, Ask, read
from phloem.router.breaker import Breaker
from phloem.router.cached import Cached, chain
from phloem.router.policies import POLICIES
from phloem.router.policies._base import Policy
from phloem.router.prefixes import Prefixes
from phloem.router.settings import Settings
from phloem.router.worker import Worker


def policy(name: str, cached: Cached | None = None, **settings: Any) -> Policy:
    return POLICIES.get(name)(Settings(**settings), cached or Cached(), random.Random(1))


def workers(count: int) -> list[Worker]:
    return [Worker.at(f"http://w{at}:80", Settings(), at) for at in range(count)]


def ask(text: str = "", session: str = "", output: float = 0.0, **more: Any) -> Ask:
    data = text.encode()
    return Ask("/generate", "m", max(len(data) / 4, 1), output, session, prompt=data, **more)


async def test_turns_go_round_also_when_workers_come_and_go() -> None:
    found, some = policy("round_robin"), workers(3)
    assert [found.choose(ask(), some).worker.bit for _ in range(5)] == [0, 1, 2, 0, 1]
    assert [found.choose(ask(), [some[0], some[2]]).worker.bit for _ in range(3)] == [2, 0, 2]


async def test_drawing_reaches_everyone_and_two_choices_avoid_the_busy() -> None:
    some = workers(4)
    assert {policy("random").choose(ask(), some).worker.bit for _ in range(1)} <= set(range(4))
    drawn = policy("random")
    assert {drawn.choose(ask(), some).worker.bit for _ in range(100)} == set(range(4))
    some[0].take(100_000, 0, 0)
    two = policy("power_of_two")
    chosen = [two.choose(ask(), some).worker.bit for _ in range(100)]
    assert 0 not in chosen and set(chosen) == {1, 2, 3}


async def test_one_long_request_weighs_more_than_many_short_ones() -> None:
    some = workers(2)
    some[0].take(50_000, 10, 0)
    for _ in range(20):
        some[1].take(50, 10, 0)
    assert policy("power_of_two").choose(ask(), some).worker is some[1]
    assert policy("cache_aware").choose(ask("x" * 400), some).worker is some[1]


async def test_loads_are_taken_off_once_however_often_they_end() -> None:
    (worker,) = workers(1)
    load = worker.take(1000, 50, 200)
    assert (worker.running, worker.pending) == (1, 800) and worker.decoding > 0
    load.first(), load.first()
    assert worker.pending == 0 and worker.running == 1
    load.end(), load.end()
    assert (worker.running, worker.pending, worker.decoding) == (0, 0, 0)


async def test_sessions_stay_and_few_of_them_move_when_a_worker_goes() -> None:
    found, some = policy("consistent_hashing"), workers(5)
    before = {f"s{at}": found.choose(ask(session=f"s{at}"), some).worker for at in range(200)}
    assert len(set(before.values())) == 5
    assert all(found.choose(ask(session=name), some).worker is worker for name, worker in before.items())
    left = some[:4]
    moved = [name for name, worker in before.items() if found.choose(ask(session=name), left).worker is not worker]
    assert set(moved) == {name for name, worker in before.items() if worker is some[4]}


async def test_a_named_worker_is_taken_and_a_session_stays_where_it_was() -> None:
    found, some = policy("manual"), workers(3)
    assert found.choose(ask(target=some[2].url), some).worker is some[2]
    assert found.choose(ask(target=some[1].id), some).worker is some[1]
    with pytest.raises(BadRequest, match="no worker of this model"):
        found.choose(ask(target="http://other:1"), some)
    first = found.choose(ask(session="s"), some).worker
    found.sent(ask(session="s"), first)
    first.take(1_000_000, 0, 0)
    assert found.choose(ask(session="s"), some).worker is first
    assert found.choose(ask(session="t"), some).worker is not first


async def test_a_prompt_goes_where_its_beginning_went() -> None:
    found, some = policy("cache_aware"), workers(4)
    system = "You are helpful. " * 100
    for at in range(4):
        found.sent(ask(f"conversation {at}: {system}"), some[at])
    for at in range(4):
        chosen = found.choose(ask(f"conversation {at}: {system} and what then?"), some)
        assert chosen.worker is some[at] and chosen.cached > 300 and "tokens cached" in chosen.why
    assert found.choose(ask("nothing of the kind " * 50), some).cached == 0
    found.gone(some[0])
    assert found.choose(ask(f"conversation 0: {system}"), some).cached == 0


async def test_a_small_share_counts_for_nothing_without_events() -> None:
    found, some = policy("cache_aware", cache_threshold=0.5), workers(2)
    found.sent(ask("a" * PIECE * 4), some[0])
    assert found.choose(ask("a" * PIECE * 4 + "b" * PIECE * 2), some).cached > 0
    assert found.choose(ask("a" * PIECE * 4 + "b" * PIECE * 8), some).cached == 0


async def test_what_is_cached_does_not_outweigh_a_long_queue() -> None:
    found, some = policy("cache_aware"), workers(2)
    text = "y" * 8000
    found.sent(ask(text), some[0])
    assert found.choose(ask(text), some).worker is some[0]
    some[0].take(1500, 0, 0)  # less than the 2,000 tokens that it has
    assert found.choose(ask(text), some).worker is some[0]
    some[0].take(1500, 0, 0)
    assert found.choose(ask(text), some).worker is some[1]


async def test_far_too_many_requests_at_one_worker_send_others_elsewhere() -> None:
    found, some = policy("cache_aware", balance_abs_threshold=8, balance_rel_threshold=1.5), workers(3)
    text = "z" * 80_000
    found.sent(ask(text), some[0])
    for _ in range(9):
        some[0].take(1, 0, 0)
    chosen = found.choose(ask(text), some)
    assert chosen.worker is not some[0] and "emptier" in chosen.why


async def test_events_say_exactly_what_is_cached() -> None:
    cached, some = Cached(), workers(3)
    found = policy("cache_aware", cached)
    ids = list(range(100, 164))
    for bit, count in ((0, 16), (1, 48)):
        hashes = list(range(1000 * bit + 1, 1000 * bit + 1 + count // 16))
        cached.take(bit, [{"type": "BlockStored", "block_hashes": hashes, "parent_block_hash": None,
                           "token_ids": ids[:count], "block_size": 16, "medium": "GPU"}])  # fmt: skip
    asked = ask("", ids=ids)
    asked.tokens = 64
    assert found.choose(asked, some).worker is some[1] and found.choose(asked, some).cached == 48
    cached.take(1, [["BlockRemoved", [1002, 1003], "GPU"]])
    assert found.choose(asked, some).cached == 16
    cached.take(1, [["AllBlocksCleared"]])
    assert found.choose(asked, some).worker is some[0]
    cached.forget(0)
    assert found.choose(asked, some).cached == 0


def test_events_of_arrays_and_maps_are_read_alike_and_pages_hang_on_their_parents() -> None:
    one, other, ids = Cached(), Cached(), list(range(32))
    one.take(
        0,
        [
            {
                "type": "BlockStored",
                "block_hashes": [b"a"],
                "parent_block_hash": None,
                "token_ids": ids[:16],
                "block_size": 16,
            }
        ],
    )
    one.take(
        0,
        [
            {
                "type": "BlockStored",
                "block_hashes": [b"b"],
                "parent_block_hash": b"a",
                "token_ids": ids[16:],
                "block_size": 16,
            }
        ],
    )
    other.take(0, [["BlockStored", [5, -6], None, ids, 16, None, "GPU", None, None]])
    assert one.match(ids, "", [0]) == other.match(ids, "", [0]) == {0: 32}
    other.take(0, [["BlockStored", [9], 777, [1] * 16, 16]])  # of a parent that nobody knows
    assert other.pages(0) == 2
    other.take(0, [["BlockStored", [7, 8], None, [*ids[:16], *[3] * 16], 16, None, "DISK"]])
    assert other.pages(0) == 2
    salted = Cached()
    salted.take(0, [["BlockStored", [5], None, ids[:16], 16, None, "GPU", None, ["tenant"]]])
    assert salted.match(ids, "", [0]) == {} and salted.match(ids, "tenant", [0]) == {0: 16}
    for noise in (
        None,
        7,
        [],
        ["Other"],
        {},
        {"type": "BlockStored"},
        ["BlockStored", [1], None, [1], 16],
        ["BlockStored", [1], None, [10**30], 1],
    ):
        other.take(0, [noise])
    assert other.pages(0) == 2


def test_random_lives_of_pages_are_known_as_a_set_says() -> None:
    rng, cached = random.Random(4), Cached()
    truth: dict[int, set[tuple[int, ...]]] = {0: set(), 1: set(), 2: set()}
    for _ in range(400):
        bit = rng.randrange(3)
        tokens = [rng.randrange(3) for _ in range(4 * rng.randrange(1, 6))]
        prefixes = [tuple(tokens[: end + 4]) for end in range(0, len(tokens), 4)]
        if rng.random() < 0.6:
            names = [hash(prefix) for prefix in prefixes]
            cached.take(bit, [["BlockStored", names, None, tokens, 4]])
            truth[bit] |= set(prefixes)
        elif rng.random() < 0.95:
            gone = {prefix for prefix in truth[bit] if prefix[: len(prefixes[0])] == prefixes[0]}
            cached.take(bit, [["BlockRemoved", [hash(prefix) for prefix in gone]]])
            truth[bit] -= gone
        else:
            cached.take(bit, [["AllBlocksCleared"]])
            truth[bit].clear()
        asked = [rng.randrange(3) for _ in range(24)]
        want = {
            b: depth
            for b in range(3)
            if (
                depth := max(
                    (end for end in range(4, 25, 4) if all(tuple(asked[:e]) in truth[b] for e in range(4, end + 1, 4))),
                    default=0,
                )
            )
        }
        assert cached.match(asked, "", [0, 1, 2]) == want


def test_what_was_used_longest_ago_is_forgotten_first() -> None:
    seen = Prefixes(4)
    seen.add([1, 2], 0)
    seen.add([3, 4], 1)
    seen.add([1], 2)
    seen.add([5], 0)
    assert len(seen) == 4 and seen.match([1], 0b111) == {0: 1, 2: 1} and seen.match([2], 0b111) == {}
    assert seen.match([1, 9], 0b111) == {0: 1, 2: 1} and seen.match([], 0b111) == {}
    seen.forget(0)
    assert seen.match([1], 0b111) == {2: 1} and seen.match([5], 1) == {}


def test_chains_differ_from_their_first_different_page_on() -> None:
    assert chain([1, 2, 3, 4, 5], 2) == chain([1, 2, 3, 4], 2)
    assert (
        chain([1, 2, 3, 4], 2)[0] == chain([1, 2, 9, 9], 2)[0]
        and chain([1, 2, 3, 4], 2)[1] != chain([1, 2, 9, 9], 2)[1]
    )
    assert chain([1, 23], 2) != chain([12, 3], 2)


def test_a_choice_among_a_thousand_workers_takes_a_moment() -> None:
    cached, some = Cached(), workers(1)
    found = policy("cache_aware", cached)
    many = [Worker.at(f"http://w{at}:80", Settings(), at) for at in range(1000)]
    asked = ask("x" * 16_000)
    for worker in many[::3]:
        found.sent(asked, worker)
    begin = time.perf_counter()
    for _ in range(20):
        found.choose(asked, many)
    assert (time.perf_counter() - begin) / 20 < 1 and some


# what is read of requests


def body(**fields: Any) -> bytes:
    return msgspec.json.encode(fields)


def skim(path: str, data: bytes, **headers: str) -> Ask:
    pairs = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return read(path, pairs, data, (b"x-session-id",))


def test_model_work_session_and_priority_are_read_of_every_route() -> None:
    chat = skim(
        "/v1/chat/completions",
        body(model="m", messages=[{"role": "user", "content": "x" * 4000}], max_tokens=7, user="u"),
    )
    assert chat.model == "m" and 1000 <= chat.tokens < 1020 and chat.output == 7 and chat.session == "u"
    native = skim(
        "/generate", body(input_ids=[1, 2, 3], sampling_params={"max_new_tokens": 5}, priority=3), x_session_id="s"
    )
    assert (native.ids, native.tokens, native.output, native.session, native.priority) == ([1, 2, 3], 3, 5, "s", 3)
    assert skim("/v1/completions", body(prompt=["a", "b"])).ids is None
    assert skim("/v1/completions", body(prompt="a" * 400, n=3, max_tokens=10)).output == 30
    assert skim("/v1/completions", body(prompt="a", max_tokens=10**9)).output < 10_000
    assert skim("/v1/responses", body(input="hi", previous_response_id="resp_1")).stored
    assert skim("/v1/responses/resp_1", b"").stored and not skim("/v1/responses", body(input="hi")).stored
    assert skim("/v1/messages", body(messages=[]), x_worker="w", x_priority="-5").target == "w"
    assert skim("/v1/messages", b"", x_priority="-5").priority == -5


@pytest.mark.parametrize(
    "data", [b"", b"not json", b"[]", b'"text"', b"{", b"\xff\xfe", b'{"model": 5, "messages": 7}', b"[" * 5000]
)
def test_what_cannot_be_read_is_a_small_request_for_any_model(data: bytes) -> None:
    found = skim("/v1/chat/completions", data)
    assert found.model == "" and 0 < found.tokens < 100


def test_a_turn_of_a_conversation_begins_with_the_one_before() -> None:
    messages = [{"role": "user", "content": "q" * 500}]
    first = skim("/v1/chat/completions", body(messages=messages)).pieces
    messages += [{"role": "assistant", "content": "a" * 300}, {"role": "user", "content": "q" * 200}]
    second = skim("/v1/chat/completions", body(messages=messages, temperature=1)).pieces
    assert second[: len(first)] == first and len(second) > len(first)
    assert skim("/v1/chat/completions", body(messages=messages, cache_salt="s")).pieces[0] != second[0]


# what workers are


def test_addresses_have_one_spelling() -> None:
    assert parse_url("a:30000/") == parse_url("http://a:30000") == ("http://a:30000", "a", 30000)
    assert parse_url("http://[::1]:5")[:2] == ("http://[::1]:5", "::1")
    for wrong in ("https://a", "http://a/path", "http://", "http://u:p@a", "http://a:99999", ""):
        with pytest.raises(BadRequest, match="worker url"):
            parse_url(wrong)


def test_a_circuit_opens_tries_once_and_closes() -> None:
    breaker = Breaker(
        Settings(cb_failure_threshold=3, cb_window_duration_secs=10, cb_timeout_duration_secs=5, cb_success_threshold=2)
    )
    for now in (0.0, 1.0, 20.0, 21.0):
        breaker.failed(now)
    assert breaker.allows(21) and breaker.state(21) == "closed"  # the first two are out of the window
    breaker.failed(22)
    assert not breaker.allows(23) and breaker.state(23) == "open"
    assert breaker.allows(28) and breaker.state(28) == "half_open"
    breaker.begun(28)
    assert not breaker.allows(28)  # one tries, the others wait
    breaker.failed(29)
    assert not breaker.allows(30) and breaker.allows(34)
    for now in (34.0, 34.5):
        breaker.begun(now)
        breaker.succeeded()
    assert breaker.state(35) == "closed"
    off = Breaker(Settings(cb_failure_threshold=1, disable_circuit_breaker=True))
    off.failed(0)
    assert off.allows(0)


def test_a_worker_learns_its_speed_from_its_own_counters() -> None:
    (worker,) = workers(1)
    worker.learn({"total_prefill_uncached_tokens": 0, "total_prefill_busy_us": 0})
    for at in range(1, 12):
        worker.learn({"total_prefill_uncached_tokens": at * 10_000, "total_prefill_busy_us": at * 1_000_000})
    assert 9900 < worker.rate < 10_100
    worker.learn({})
    assert worker.rate > 1000


def test_wrong_settings_are_named() -> None:
    with pytest.raises(ConfigError, match="first_byte_timeout"):
        Settings(first_byte_timeout=0).checked()
    with pytest.raises(ConfigError, match="cache_threshold"):
        Settings(cache_threshold=1.5).checked()
    with pytest.raises(ConfigError, match="queue_size"):
        Settings(queue_size=-1).checked()
