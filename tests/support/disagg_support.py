"""A prefill and a decode server without models or HTTP: two drivers, whose transports are real."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from tier_support import StoreCopies

from phloem.core.errors import ConfigError, PhloemError
from phloem.disagg.arrivals import Arrivals, Target
from phloem.disagg.bootstrap import Book, Bootstrap, Directory, machine_id
from phloem.disagg.rooms import Rooms, Source
from phloem.disagg.transports import TRANSPORTS, Transport
from phloem.scheduler.remote import Remote
from phloem.testing.driver import Driver


def transport_of(backend: str) -> Transport:
    """Skips the test where what it needs is not installed."""
    try:
        return TRANSPORTS.get(backend)()
    except ConfigError as error:
        pytest.skip(error.message)


FACTS = {"model": "fake", "page_size": "4"}


def until(holds: Callable[[], bool], *drivers: Driver, seconds: float = 20.0) -> None:
    """Step the drivers until it holds."""
    end = time.monotonic() + seconds
    while not holds():
        for driver in drivers:
            driver.step()
        time.sleep(0.0005)
        assert time.monotonic() < end, "it never came to hold"


@dataclass
class FakeLent:
    """An adapter that changes nothing of what `FakeRunner` computes."""

    uid: str
    what: str
    entry: int = 1
    error: PhloemError | None = None

    def ready(self) -> bool:
        return True

    def content(self) -> str:
        return self.what


class FakeLender:
    """`content`: of every adapter that it lends."""

    most = 8

    def __init__(self, content: str) -> None:
        self._content = content

    def lend(self, name: str) -> FakeLent:
        return FakeLent(f"{name}@1", self._content)

    def tokens(self, name: str) -> int:
        return 0

    def give_back(self, lent: Any) -> None: ...

    def load(self, name: str, path: str, pinned: bool) -> Any: ...

    def unload(self, name: str) -> tuple[int, dict[str, str]]:
        return 0, {}

    def loaded(self) -> dict[str, str]:
        return {}

    def rebase(self) -> None: ...

    def renewed(self, lent: Any) -> Any:
        return lent

    def state(self) -> dict[str, Any]:
        return {}


class Pair:
    """`weights`: what each says that its weights are. `prefill.run()` and `decode.run()` are not for requests of rooms:
    the other one would stand still."""

    def __init__(
        self, backend: str = "shm", *, meet: float = 30.0, keep: float = 30.0, wait: float = 300.0, **more: Any
    ):
        self.prefill, self.decode = Driver(chunked_prefill_size=16), Driver(**more)
        self.weights = {"prefill": "1", "decode": "1"}
        self.facts = dict(FACTS)
        transport = transport_of(backend)
        ours = StoreCopies(self.prefill.runner.stores[0])
        source = Source(ours.out, ours.page_bytes, FACTS, lambda: self.weights["prefill"])
        self.rooms = Rooms(self.prefill.cache, source, [transport], "127.0.0.1", meet=meet, keep=keep)
        own = {"phloem": {"machine": machine_id(), "addresses": self.rooms.addresses}}
        self.bootstrap = Bootstrap("127.0.0.1", 0, Directory({}, own))
        self._join(self.prefill, Remote(self.rooms, None))
        theirs, scheduler = StoreCopies(self.decode.runner.stores[0]), self.decode.scheduler
        target = Target(
            theirs.into, theirs.page_bytes, self.facts, lambda: self.weights["decode"], scheduler.between, 1 << 20,
            scheduler.settings.vocab_size,
        )  # fmt: skip
        self.arrivals = Arrivals(self.decode.cache, target, Book([transport]), wait)
        scheduler.further = self.arrivals
        self._join(self.decode, Remote(None, self.arrivals))

    @staticmethod
    def _join(driver: Driver, remote: Remote) -> None:
        driver.scheduler.remote = remote
        driver.scheduler.results.on_end = remote.ended

    def to_prefill(self, name: str, prompt: list[int], count: int = 8, **values: Any) -> None:
        asked: dict[str, Any] = {"room": f"{name}/0", **values}
        self.prefill.submit(name, prompt, count, **asked)

    def to_decode(self, name: str, prompt: list[int], count: int = 8, **values: Any) -> None:
        place = {"prefill_host": "127.0.0.1", "prefill_port": self.bootstrap.port}
        asked: dict[str, Any] = {"room": f"{name}/0", **place, **values}
        self.decode.submit(name, prompt, count, **asked)

    def both(self, name: str, prompt: list[int], count: int = 8, **values: Any) -> None:
        self.to_prefill(name, prompt, count, **values)
        self.to_decode(name, prompt, count, **values)

    def run(self) -> None:
        """Until nothing lives, and nothing is locked or held."""

        def over() -> bool:
            idle = not self.prefill.scheduler.live and not self.decode.scheduler.live
            return idle and not self.rooms.busy and not self.arrivals.state()["kv_row_bytes_held"]

        until(over, self.prefill, self.decode)
        for driver in (self.prefill, self.decode):
            driver.run()
            assert not driver.cache.holds

    def close(self) -> None:
        self.bootstrap.close()
        self.rooms.close()
