"""Which replica a request goes to."""

from __future__ import annotations

import random

import pytest

from phloem.core.messages import pack_ids
from phloem.scheduler.data_parallel import BLOCK, Balancer, Method


def prompt(seed: int, size: int = 4 * BLOCK) -> bytes:
    rng = random.Random(seed)
    return pack_ids([rng.randrange(1000) for _ in range(size)])


def test_round_robin_takes_those_that_serve_in_turn() -> None:
    balancer = Balancer(3, "round_robin")
    assert [balancer.choose(str(at), prompt(at), "", [0, 1, 2]) for at in range(4)] == [0, 1, 2, 0]
    assert [balancer.choose(f"b{at}", prompt(at), "", [0, 2]) for at in range(4)] == [0, 2, 0, 2]


def test_fewest_requests_and_fewest_tokens_differ() -> None:
    def loaded(method: Method) -> Balancer:
        balancer = Balancer(2, method)
        balancer.give("long", prompt(1, 1000), "", 0)
        balancer.give("a", prompt(2, 10), "", 1)
        balancer.give("b", prompt(3, 10), "", 1)
        return balancer

    assert loaded("total_requests").choose("x", prompt(4), "", [0, 1]) == 0
    assert loaded("total_tokens").choose("x", prompt(4), "", [0, 1]) == 1
    assert loaded("auto").choose("x", prompt(4), "", [0, 1]) == 1


def test_tokens_that_a_replica_gives_count_until_their_request_ends() -> None:
    balancer = Balancer(2)
    balancer.give("a", prompt(1, 100), "", 0)
    assert (balancer.tokens(0), balancer.requests(0)) == (100, 1)
    balancer.stepped(0)
    balancer.began("a")
    for _ in range(9):
        balancer.stepped(0)
    balancer.began("a")
    assert balancer.tokens(0) == 109
    balancer.give("b", prompt(2, 50), "", 0)
    balancer.stepped(0)
    assert balancer.tokens(0) == 160, "one that has not begun gains none"
    balancer.ended("a")
    balancer.ended("a")
    assert (balancer.tokens(0), balancer.requests(0)) == (50, 1)
    assert balancer.of("a") is None and balancer.of("b") == 0
    balancer.ended("b")
    assert (balancer.tokens(0), balancer.requests(0)) == (0, 0)


def test_a_known_prompt_stays_where_it_is_known_unless_that_replica_has_much_more_to_do() -> None:
    balancer = Balancer(2)
    text = prompt(1, 8 * BLOCK)
    balancer.give("first", text, "", 1)
    balancer.ended("first")
    assert balancer.choose("again", text + prompt(2, 10), "", [0, 1]) == 1
    assert balancer.tokens(1) == 10, "what is known need not be done"
    assert balancer.choose("salted", text, "another namespace", [0, 1]) == 0
    # As much again to do at the one that knows the prompt: the other one reads it anew.
    balancer.give("load", prompt(3, 40 * BLOCK), "", 1)
    assert balancer.choose("moved", text, "", [0, 1]) == 0
    assert balancer.choose("third", text, "", [0, 1]) == 0, "now both know it"


def test_what_a_lost_replica_knew_and_did_is_gone() -> None:
    balancer = Balancer(2)
    text = prompt(1)
    for key in ("a", "b"):
        balancer.give(key, text, "", 1)
    balancer.give("c", prompt(2, 10), "", 0)
    assert sorted(balancer.lost(1)) == ["a", "b"]
    assert balancer.of("a") is None and balancer.tokens(1) == 0
    balancer.ended("a")
    assert balancer.choose("d", text, "", [0, 1]) == 1 and balancer.tokens(1) == 4 * BLOCK


def test_blocks_that_were_used_last_are_remembered() -> None:
    balancer = Balancer(2, most=8)
    for at in range(8):
        balancer.give(str(at), prompt(at), "", 0)
        balancer.ended(str(at))
    balancer.give("new", prompt(7), "", 0)
    assert balancer.tokens(0) == 0
    balancer.give("old", prompt(0), "", 0)
    assert balancer.tokens(0) == 4 * BLOCK


@pytest.mark.parametrize("method", ["auto", "total_tokens", "total_requests"])
def test_loads_stay_even_whatever_comes(method: Method) -> None:
    balancer, rng = Balancer(4, method), random.Random(3)
    live: list[str] = []
    for at in range(400):
        key = str(at)
        balancer.choose(key, prompt(rng.randrange(40), rng.randrange(1, 6 * BLOCK)), "", range(4))
        live.append(key)
        if len(live) > 60:
            balancer.ended(live.pop(rng.randrange(len(live))))
    counts = [balancer.requests(rank) for rank in range(4)]
    assert sum(counts) == len(live)
    measure = counts if method == "total_requests" else [balancer.tokens(rank) for rank in range(4)]
    assert max(measure) <= 1.5 * min(measure) + 6 * BLOCK
    for key in live:
        balancer.ended(key)
    assert all(balancer.tokens(rank) == balancer.requests(rank) == 0 for rank in range(4))
