"""Cache tiers over a runner without a model, and rows for stores."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from phloem.kvcache.tiers import BLOCK, Place, Row, Tier
from phloem.kvcache.tiers._fetch import Waiting
from phloem.kvcache.tiers._keys import Keys
from phloem.kvcache.tiers._service import Settings, Surroundings, Tiers
from phloem.kvcache.tiers.disk import Tier as Disk
from phloem.kvcache.tiers.host import Tier as Host
from phloem.testing.driver import Driver
from phloem.utils import memory

PLACE = Place(BLOCK, 1 << 20)


def rows_of(count: int, seed: int = 1, size: int = BLOCK) -> list[Row]:
    block = memory.zeros(count * size).reshape(count, size)
    block[:] = np.random.default_rng(seed).integers(0, 256, block.shape, np.uint8)
    return list(block)


def keys_of(count: int, chain: int = 0) -> list[bytes]:
    return [bytes([chain, at]) * 16 for at in range(count)]


def disk_in(folder: Path, most: int = 1 << 20, size: int = BLOCK) -> Disk:
    return Disk(Place(size, most, folder))


class StoreCopies:
    """Of what a `FakeRunner` keeps of its tokens."""

    def __init__(self, store: Any, states: Any = None) -> None:
        """`states`: a state is pretended to fill two rows, and to lie in a third."""
        self._store, self.page_bytes = store, store[0].nbytes
        self._states, self.state_bytes = states, 0 if states is None else 2 * BLOCK + states[0].nbytes
        self.broken = False

    def out(self, pages: Any, rows: Sequence[Row]) -> None:
        for page, row in zip(np.atleast_2d(pages)[0].tolist(), rows, strict=True):
            row[: self.page_bytes] = self._store[page].view(np.uint8)

    def into(self, rows: Sequence[Row], pages: Any) -> None:
        if self.broken:
            raise RuntimeError("injected: a copy")
        for row, page in zip(rows, np.atleast_2d(pages)[0].tolist(), strict=True):
            self._store[page] = row[: self.page_bytes].view(np.int64)

    def state_out(self, slot: int, rows: Sequence[Row]) -> None:
        found = self._states[slot].view(np.uint8)
        for row in rows:
            row[:] = found[0]
        rows[2][: len(found)] = found

    def state_into(self, rows: Sequence[Row], slot: int) -> None:
        found = self._states[slot].view(np.uint8)
        found[:] = rows[2][: len(found)]
        assert all((row == found[0]).all() for row in rows[:2]), "rows of two states"


class Slow:
    """A store in memory whose reads wait for the test."""

    name, instant = "slow", True

    def __init__(self) -> None:
        self.held: dict[bytes, Any] = {}
        self.gate = threading.Event()
        self.asked = threading.Event()

    def exists(self, keys: Sequence[bytes]) -> int:
        return next((at for at, key in enumerate(keys) if key not in self.held), len(keys))

    def read(self, keys: Sequence[bytes], rows: Sequence[Row]) -> int:
        self.asked.set()
        assert self.gate.wait(20)
        for key, row in zip(keys, rows, strict=True):
            row[:] = self.held[key]
        return len(keys)

    def write(self, keys: Sequence[bytes], rows: Sequence[Row]) -> int:
        self.held |= {key: row.copy() for key, row in zip(keys, rows, strict=True)}
        return len(keys)

    def drop(self, keys: Sequence[bytes]) -> None:
        for key in keys:
            self.held.pop(key, None)

    def clear(self) -> None:
        self.held.clear()

    def stats(self) -> dict[str, float]:
        return {"pages": len(self.held)}

    def close(self) -> None: ...


class Tiered:
    """A driver whose scheduler has tiers: `rows` of host memory and a store."""

    def __init__(
        self,
        driver: Driver,
        storage: Tier | None,
        rows: int = 64,
        write: Any = "write_through",
        policy: Any = "wait_complete",
    ) -> None:
        kinds = [group.kind for group in driver.runner.groups]
        states = driver.runner.stores[-1] if kinds[-1] == "state" else None
        self.driver, self.copies = driver, StoreCopies(driver.runner.stores[0], states)
        scheduler = driver.scheduler
        around = Surroundings(
            scheduler.between,
            lambda: scheduler.weight_version,
            lambda: scheduler.slots.num_free > 0,
            clock=driver.clock,
        )
        self.tiers = Tiers(
            driver.cache,
            self.copies,
            Keys(["fake"], driver.cache.page_size),
            Host(Place(BLOCK, rows * BLOCK)),
            storage,
            Settings(write, Waiting(policy)),
            around,
        )
        scheduler.further = self.tiers

    def run(self) -> None:
        """Until every request has ended, and what they have computed is written."""
        end = time.monotonic() + 60
        while self.driver.scheduler.live or self.driver.scheduler.inflight:
            before = self.driver.scheduler.meter.steps
            self.driver.step()
            if self.driver.scheduler.meter.steps == before:
                time.sleep(0.0002)
            assert time.monotonic() < end, f"still alive: {list(self.driver.scheduler.live)}"
        self.driver.scheduler.flush_results()
        self.driver.step()
        assert self.tiers.settle()
        self.driver.assert_idle()
        assert self.tiers.quiet
        self.tiers.host.check()
        while self.tiers.host.stats()["pinned"]:  # fetches that nobody waits for any more
            time.sleep(0.001)
            assert time.monotonic() < end

    def ask(self, name: str, prompt: list[int], count: int = 8, **values: Any) -> dict[str, int]:
        """Run a request alone; gives what was cached of its prompt, by source."""
        self.driver.submit(name, prompt, count, **values)
        self.run()
        assert self.driver.tokens[name] == self.driver.expected(prompt, count, values.get("seed", 0))
        last = self.driver.chunks[name][-1]
        device = last.cached_tokens - last.cached_host - last.cached_storage
        return {"device": device, "host": last.cached_host, "storage": last.cached_storage}

    def close(self) -> None:
        self.tiers.close()
