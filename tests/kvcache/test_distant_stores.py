"""Stores whose packages move the bytes: what one writes another reads; what hangs, fails or is broken is a miss."""

from __future__ import annotations

import os
import random
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from store_stand_ins import UNREACHABLE, Fault, Master, Stores, client_of, real, stand_in
from tier_support import Tiered, keys_of, rows_of

from phloem.core.errors import ConfigError
from phloem.kvcache.tiers import BLOCK, TIERS, Place, Tier, mooncake
from phloem.kvcache.tiers import _staged as staged
from phloem.testing.driver import Driver, random_tokens

NAMES = ("mooncake", "nixl")
REAL = [pytest.param((name, "real"), marks=pytest.mark.slow) for name in NAMES]


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """No rest between failures, unless a test wants one."""
    monkeypatch.setattr(staged, "REST", 0.0)


@pytest.fixture(params=[*((name, "stand-in") for name in NAMES), *REAL], ids="-".join)
def stores(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Stores]:
    name, kind = request.param
    yield from real(name, tmp_path) if kind == "real" else stand_in(name, monkeypatch, tmp_path)


@pytest.fixture(params=NAMES)
def faulty(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Stores]:
    yield from stand_in(request.param, monkeypatch, tmp_path)


def made(stores: Stores, most: int = 1 << 20, **extra: Any) -> Tier:
    return TIERS.get(stores.name)(Place(BLOCK, most, stores.folder, {**stores.extra, **extra}))


def fault_of(stores: Stores) -> Fault:
    assert stores.fault is not None
    return stores.fault


def read(tier: Tier, keys: list[bytes]) -> tuple[int, list[Any]]:
    rows = rows_of(len(keys), seed=99)
    count = tier.read(keys, rows)
    return count, rows[:count]


def same(found: list[Any], wanted: list[Any]) -> bool:
    return all(np.array_equal(one, other) for one, other in zip(found, wanted, strict=True))


def test_what_one_writes_another_reads_in_leading_runs(stores: Stores) -> None:
    writer, keys, rows = made(stores), keys_of(40), rows_of(40)
    assert writer.exists(keys) == 0 and writer.exists([]) == 0 and read(writer, keys) == (0, [])
    assert writer.write(keys[:35], rows) == 35 and writer.write(keys[30:], rows[30:]) == 10
    reader = made(stores)
    assert reader.exists(keys) == 40 and reader.exists([*keys[:20], *keys_of(1, 7), *keys[20:]]) == 20
    count, found = read(reader, keys)
    assert count == 40 and same(found, rows)
    assert read(reader, [*keys[:20], *keys_of(1, 7), *keys[20:]])[0] == 20
    reader.drop(keys[17:18])
    assert writer.exists(keys) == 17 and read(writer, keys)[0] == 17
    writer.close()
    assert read(reader, keys)[0] == 17 and reader.exists(keys[18:]) == 22
    reader.clear()
    assert reader.exists(keys) == reader.exists(keys[18:]) == 0
    assert reader.stats()["failed"] == reader.stats()["corrupt"] == 0
    reader.close()


def test_readers_and_writers_at_once_read_what_was_written(stores: Stores) -> None:
    tier, wrong = made(stores, 8 << 20), list[str]()

    def work(chain: int) -> None:
        keys, rows = keys_of(24, chain), rows_of(24, chain)
        for _ in range(3):
            if tier.write(keys, rows) != 24:
                wrong.append("not written")
            count, found = read(tier, keys)
            if count != 24 or not same(found, rows):
                wrong.append(f"{count} were read")

    threads = [threading.Thread(target=work, args=(chain,)) for chain in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong and not any(thread.is_alive() for thread in threads)
    tier.close()


@pytest.mark.parametrize("how", ["a bit", "another page's"])
def test_a_row_that_is_not_what_was_written_is_a_miss_for_good(how: str, faulty: Stores) -> None:
    tier, keys, rows = made(faulty), keys_of(6), rows_of(6)
    tier.write(keys, rows)
    if faulty.folder is not None:
        files = {key: next(faulty.folder.glob(f"*/{key.hex()}.page")) for key in keys}
        data = bytearray(files[keys[3]].read_bytes())
        if how == "a bit":
            data[100] ^= 4
        files[keys[3]].write_bytes(data if how == "a bit" else files[keys[2]].read_bytes())
    else:
        objects = next(iter(sys.modules["mooncake.store"].MooncakeDistributedStore.held.values()))
        name = f"phloem/{keys[3].hex()}"
        data = bytearray(objects[name])
        data[100] ^= 4
        objects[name] = bytes(data) if how == "a bit" else objects[f"phloem/{keys[2].hex()}"]
    count, found = read(tier, keys)
    assert count == 3 and same(found, rows[:3])
    assert tier.stats()["corrupt"] == 1 and tier.exists(keys) == 3
    assert tier.write(keys, rows) == 6 and same(read(tier, keys)[1], rows)
    tier.close()


def test_rows_of_another_size_are_not_there(faulty: Stores) -> None:
    keys = keys_of(3)
    wide = TIERS.get(faulty.name)(Place(2 * BLOCK, 1 << 20, faulty.folder, faulty.extra))
    assert wide.write(keys, rows_of(3, size=2 * BLOCK)) == 3
    tier = made(faulty)
    assert read(tier, keys)[0] == 0
    for one in (wide, tier):
        one.close()


def test_a_store_that_hangs_holds_nobody_up_and_writes_to_no_row_later(
    faulty: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier, keys, rows, fault = made(faulty), keys_of(4), rows_of(4), fault_of(faulty)
    assert tier.write(keys, rows) == 4
    monkeypatch.setattr(staged, "CALL_SECONDS", 0.05)
    fault.gate = threading.Event()
    given = rows_of(4, seed=99)
    before = [row.copy() for row in given]
    assert tier.read(keys, given) == 0
    calls = fault.calls
    assert (tier.exists(keys), tier.read(keys, given), tier.write(keys, rows)) == (0, 0, 0) and fault.calls == calls
    fault.gate.set()
    end = time.monotonic() + 20
    while tier.exists(keys) != 4:
        assert time.monotonic() < end
        time.sleep(0.005)
    assert same(given, before)
    assert same(read(tier, keys)[1], rows) and tier.stats()["failed"] == 1
    tier.close()


def test_a_store_that_fails_is_left_alone_for_a_while(
    faulty: Stores, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tier, keys, rows, fault = made(faulty), keys_of(4), rows_of(4), fault_of(faulty)
    assert tier.write(keys, rows) == 4
    monkeypatch.setattr(staged, "REST", 60.0)
    fault.code = UNREACHABLE
    assert read(tier, keys)[0] == 0
    calls, fault.code = fault.calls, 0
    assert tier.exists(keys) == tier.write(keys, rows) == 0 and fault.calls == calls
    assert tier.stats()["failed"] == 1 and len(caplog.records) == 1
    tier.close()


def test_tags_share_nothing_and_clearing_one_leaves_the_other(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for stores in stand_in("mooncake", monkeypatch, tmp_path):
        one, other, keys = made(stores), made(stores, extra_backend_tag="a.b"), keys_of(3)
        near = made(stores, extra_backend_tag="aXb")
        for tier in (one, other, near):
            assert tier.exists(keys) == 0 and tier.write(keys, rows_of(3)) == 3
        other.clear()
        assert (one.exists(keys), other.exists(keys), near.exists(keys)) == (3, 0, 3)


def test_a_full_store_is_read_though_not_written_to(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for stores in stand_in("mooncake", monkeypatch, tmp_path):
        tier, keys, rows = made(stores), keys_of(4), rows_of(4)
        assert tier.write(keys[:2], rows) == 2
        fault_of(stores).put_code = mooncake.FULL
        assert tier.write(keys[2:], rows[2:]) == 0
        fault_of(stores).put_code = 0
        assert tier.write(keys[2:], rows[2:]) == 0 and same(read(tier, keys)[1], rows[:2])
        monkeypatch.setattr(mooncake, "monotonic", lambda: time.monotonic() + 2 * mooncake.REST)
        assert tier.write(keys[2:], rows[2:]) == 2


@pytest.mark.parametrize(
    ("extra", "word"),
    [
        ({"master_server_address": "127.0.0.1:1"}, "no mooncake_master at '127.0.0.1:1'"),
        ({"master_server_address": "nowhere"}, "no mooncake_master at 'nowhere'"),
        ({"global_segment_size": "900TB"}, "global_segment_size"),
        ({"global_segment_size": -1}, "0 or above"),
        ({"global_segment_size": "much"}, "is not a size"),
        ({"local_buffer_size": []}, "local_buffer_size"),
        ({"extra_backend_tag": "a/b"}, "extra_backend_tag"),
        ({"colour": "red"}, "colour"),
    ],
    ids=str,
)
def test_settings_of_mooncake_that_are_wrong_are_named(
    extra: dict[str, Any], word: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for stores in stand_in("mooncake", monkeypatch, tmp_path):
        with pytest.raises(ConfigError, match=word):
            made(stores, **extra)


def test_what_mooncake_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for stores in stand_in("mooncake", monkeypatch, tmp_path):
        tier: Any = made(stores, global_segment_size="2mb", local_buffer_size="4MiB", protocol="rdma", device_name="x")
        master = stores.extra["master_server_address"]
        assert tier._store.given == ("127.0.0.1", "P2PHANDSHAKE", 2 << 20, 4 << 20, "rdma", "x", master)
        fault_of(stores).code = -1
        with pytest.raises(ConfigError, match="cannot be set up: -1"):
            made(stores)
        with pytest.raises(ConfigError, match="master_server_address"):
            TIERS.get("mooncake")(Place(BLOCK, 1 << 20))


@pytest.mark.parametrize(("name", "package"), [("mooncake", "mooncake.store"), ("nixl", "nixl._api")])
def test_a_package_that_is_not_installed_is_named(
    name: str, package: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match="pip install"):
        TIERS.get(name)(Place(BLOCK, 1 << 20, tmp_path, {"master_server_address": "x:1"} if name == "mooncake" else {}))


def test_files_of_killed_processes_and_too_many_pages_go(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for stores in stand_in("nixl", monkeypatch, tmp_path):
        tier, keys, rows = made(stores, most=8 * (BLOCK + 8)), keys_of(12), rows_of(12)
        assert tier.write(keys[:6], rows) == 6
        old, young = (next(tmp_path.iterdir()) / f"{name}.part" for name in ("old", "young"))
        for path in (old, young):
            path.write_bytes(b"begun")
        os.utime(old, (1.0, 1.0))
        again = made(stores, most=8 * (BLOCK + 8))
        assert not old.exists() and young.exists() and again.stats()["pages"] == 6
        assert read(again, keys[:2])[0] == 2
        assert again.write(keys[6:], rows[6:]) == 6 and again.stats()["evicted"] == 4
        assert len(list(tmp_path.glob("*/*.page"))) == 8 and again.exists(keys[:2]) == 2 == again.exists(keys)
        next(tmp_path.glob(f"*/{keys[0].hex()}.page")).write_bytes(b"short")
        assert again.exists(keys) == 0 == read(again, keys)[0]
        with pytest.raises(ConfigError, match="plugin: GDS"):
            made(stores, plugin="GDS")


# with a scheduler above


def prompts_of(count: int) -> list[list[int]]:
    return [random_tokens(random.Random(seed), 60) for seed in range(count)]


def test_answers_are_the_oracles_whatever_the_store_does(stores: Stores, monkeypatch: pytest.MonkeyPatch) -> None:
    tiered, prompts = Tiered(Driver(40, 4), made(stores), 16), prompts_of(6)
    for at, prompt in enumerate(prompts):
        assert sum(tiered.ask(f"a{at}", prompt).values()) == 0
    tiered.tiers.flush()
    assert tiered.ask("b", prompts[0])["storage"] == 56
    if stores.fault is not None:
        monkeypatch.setattr(staged, "CALL_SECONDS", 0.05)
        tiered.tiers.flush()
        stores.fault.code = UNREACHABLE
        assert tiered.ask("c", prompts[1])["storage"] == 0
        stores.fault.code = 0
        stores.fault.gate = threading.Event()
        assert tiered.ask("d", prompts[2])["storage"] == 0
        stores.fault.gate.set()
    tiered.close()


def test_what_a_store_has_lost_is_sent_to_it_again(stores: Stores) -> None:
    store = made(stores)
    tiered, prompt = Tiered(Driver(40, 4), store, 16), prompts_of(1)[0]
    for at, found in enumerate((0, 56)):
        assert tiered.ask(f"a{at}", prompt)["storage"] == found
        tiered.tiers.flush()
        assert tiered.driver.control("flush_cache") is not None
    store.clear()  # by somebody else, or it was started again
    for at, found in enumerate((0, 56)):
        assert tiered.ask(f"b{at}", prompt)["storage"] == found
        tiered.tiers.flush()
        assert tiered.driver.control("flush_cache") is not None
    tiered.close()


@pytest.mark.slow
def test_a_real_master_that_is_killed_is_a_miss_and_one_that_comes_again_is_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(staged, "CALL_SECONDS", 2.0)
    master = Master()
    client = client_of(master)
    try:
        extra = {"master_server_address": master.address, "global_segment_size": 0}
        store = TIERS.get("mooncake")(Place(BLOCK, 1 << 20, None, extra))
        tiered, prompts = Tiered(Driver(40, 4), store, 16), prompts_of(4)
        tiered.ask("a", prompts[0])
        tiered.tiers.flush()
        assert tiered.driver.control("flush_cache") is not None
        assert tiered.ask("again", prompts[0])["storage"] == 56
        master.kill()
        tiered.tiers.flush()
        assert tiered.driver.control("flush_cache") is not None
        assert tiered.ask("b", prompts[0])["storage"] == 0
        assert tiered.ask("c", prompts[1])["storage"] == 0 and store.stats()["failed"] > 0
        master.start()
        end, keys = time.monotonic() + 60, keys_of(2)
        while store.write(keys, rows_of(2)) != 2 or read(store, keys)[0] != 2:
            assert time.monotonic() < end, "it never came back"
            time.sleep(0.2)
        tiered.ask("d", prompts[2])
        tiered.tiers.flush()
        assert tiered.driver.control("flush_cache") is not None
        assert tiered.ask("e", prompts[2])["storage"] == 56
        tiered.close()
    finally:
        client.close()
        master.kill()
