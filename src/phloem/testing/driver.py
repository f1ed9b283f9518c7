"""Drives a scheduler over a `FakeRunner` step by step and collects what it sends, for tests."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

from phloem.core.messages import (
    Abort,
    Chunk,
    Control,
    ControlReply,
    FromEngine,
    Logprobs,
    Stats,
    Submit,
    Tokens,
    decode_from_engine,
    encode,
    pack_ids,
)
from phloem.core.request import FinishReason, SamplingParams
from phloem.kvcache.manager import CacheManager
from phloem.scheduler.scheduler import Scheduler, ScheduleSettings
from phloem.testing.fake_runner import FIRST_TOKEN, FULL, FakeRunner, oracle

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from phloem.core.batch import Batch
    from phloem.core.memory import MemorySpec

EOS = 2


def random_tokens(rng: random.Random, count: int, kinds: int = 900) -> list[int]:
    """A prompt of `count` ids out of `kinds` different ones; few kinds make prefixes collide."""
    return [FIRST_TOKEN + rng.randrange(kinds) for _ in range(count)]


class ManualClock:
    """Time that a test moves by hand, in seconds."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Unfold:
    """Reads one engine's `Tokens` as if all were chunks."""

    def __init__(self) -> None:
        self._rows: list[str] = []

    def chunks(self, message: Tokens) -> list[Chunk]:
        if message.rows is not None:
            self._rows = message.rows
        pairs = zip(self._rows, message.plain, strict=True) if message.plain else ()
        return [*(Chunk(id=key, tokens=[token]) for key, token in pairs), *message.chunks]


class Driver:
    """`scheduler`, `runner` and `cache` are open to the test. Page accounting is checked after every step."""

    def __init__(
        self,
        num_pages: int | Sequence[int] = 200,
        page_size: int = 4,
        max_slots: int = 8,
        *,
        cache: bool = True,
        eviction: str = "lru",
        prepare: Callable[..., Any] | None = None,
        fail_row: Callable[[str, int], str | None] | None = None,
        starve: Callable[[Batch], bool] | None = None,
        memory: Sequence[MemorySpec] = FULL,
        drafter: Callable[[str, int, int], list[int]] | None = None,
        draft_room: int = 0,
        **settings: Any,
    ) -> None:
        self.clock = ManualClock()
        self.memory = memory
        self.runner = FakeRunner(
            num_pages, page_size, max_slots, fail_row=fail_row, starve=starve, memory=memory, drafter=drafter,
            draft_room=draft_room,
        )  # fmt: skip
        self.cache = CacheManager(self.runner.groups, self.runner.num_pages, page_size, cache, eviction)
        values: dict[str, Any] = {
            "max_running_requests": max_slots,
            "context_length": 10_000,
            "vocab_size": self.runner.vocab_size,
            "eos_ids": (EOS,),
            "chunked_prefill_size": 64,
            "random_seed": 1,
            "debug_invariants": True,
            **settings,
        }
        self.tokens: dict[str, list[int]] = {}
        self.chunks: dict[str, list[Chunk]] = {}
        self.finish: dict[str, FinishReason] = {}
        self.replies: dict[str, ControlReply] = {}
        self.stats: list[Stats] = []
        self.sent: list[FromEngine] = []
        self._unfold = Unfold()
        self.scheduler = Scheduler(
            self.runner, ScheduleSettings(**values), self.cache, self._take, self.clock, prepare=prepare
        )

    def _take(self, message: FromEngine) -> None:
        message = decode_from_engine(encode(message))
        self.sent.append(message)
        if isinstance(message, ControlReply):
            assert message.id not in self.replies, "two replies to one call"
            self.replies[message.id] = message
        elif isinstance(message, Stats):
            self.stats.append(message)
        elif isinstance(message, Tokens):
            for chunk in self._unfold.chunks(message):
                assert chunk.id not in self.finish, f"{chunk.id}: a chunk after its last"
                self.tokens.setdefault(chunk.id, []).extend(chunk.tokens)
                self.chunks.setdefault(chunk.id, []).append(chunk)
                if chunk.finish is not None:
                    self.finish[chunk.id] = chunk.finish

    def submit(
        self, name: str, prompt: list[int], max_new: int | None = 8, seed: int | None = 0, **values: Any
    ) -> None:
        """`values`: fields of `SamplingParams` or of `Submit`."""
        fields = set(SamplingParams.__struct_fields__)
        params = {key: value for key, value in values.items() if key in fields}
        rest = {key: value for key, value in values.items() if key not in fields}
        sampling = SamplingParams(max_new_tokens=max_new, sampling_seed=seed, **params)
        self.scheduler.receive(Submit(id=name, input_ids=pack_ids(prompt), sampling=sampling, **rest))

    def abort(self, name: str) -> None:
        self.scheduler.receive(Abort(id=name))

    def control(self, name: str, **args: Any) -> ControlReply | None:
        """The reply, if it has come at once; else look in `replies` under the call's name later."""
        self.replies.pop(name, None)
        self.scheduler.receive(Control(id=name, name=name, args=args))
        return self.replies.get(name)

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            self.clock.now += 0.01
            self.scheduler.step()

    def run(self, limit: int = 20_000) -> None:
        """Until every request has ended and nothing is in flight."""
        for _ in range(limit):
            if not self.scheduler.live and not self.scheduler.inflight:
                break
            self.step()
        else:
            raise AssertionError(f"still alive after {limit} steps: {list(self.scheduler.live)}")
        self.scheduler.flush_results()
        self.assert_idle()

    def assert_idle(self) -> None:
        """No request, no held page: every page is free or unlocked in the tree."""
        assert not self.scheduler.live and not len(self.scheduler.queue)
        assert self.scheduler.nothing_held and self.cache.held_pages == 0
        assert self.cache.available_pages == self.cache.total_pages
        self.scheduler.check()

    def expected(self, prompt: list[int], count: int, seed: int = 0, forced: dict[int, int] | None = None) -> list[int]:
        """What the oracle says, cut after the first end-of-sequence token."""
        found = oracle(prompt, seed, count, self.runner.vocab_size, forced, self.memory)
        return found[: found.index(EOS) + 1] if EOS in found else found

    def joined(self, name: str) -> Logprobs:
        """Output logprobs of all chunks of a request."""
        whole = Logprobs()
        for chunk in self.chunks[name]:
            if chunk.logprobs is not None:
                whole.values += chunk.logprobs.values
                whole.top += chunk.logprobs.top
                whole.chosen += chunk.logprobs.chosen
        return whole


def storm(
    driver: Driver, count: int, rng: random.Random, longest: int = 40, most_new: int = 30
) -> dict[str, list[int]]:
    """Submit requests `q0`.. with colliding prefixes and random ends; gives what each must answer."""
    want: dict[str, list[int]] = {}
    shared = random_tokens(rng, longest // 2)
    for index in range(count):
        name = f"q{index}"
        prompt = shared[: rng.randrange(len(shared))] + random_tokens(rng, rng.randrange(1, longest // 2), kinds=3)
        new = rng.randrange(1, most_new)
        if index % 3 == 0:
            driver.runner.force[name] = {len(prompt) + rng.randrange(new): EOS}
        want[name] = driver.expected(prompt, new, index, driver.runner.force.get(name))
        driver.submit(name, prompt, new, seed=index)
    return want
