"""Stores of pages: what was written is read, also by a later process; what is broken, full or gone is a miss."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tier_support import disk_in, keys_of, rows_of

from phloem.core.errors import ConfigError
from phloem.core.memory import Latent, MemorySpec, Paged
from phloem.kvcache.namespaces import namespace
from phloem.kvcache.pool import KVPool
from phloem.kvcache.tiers import BLOCK, Place, rounded
from phloem.kvcache.tiers import _segments as segments
from phloem.kvcache.tiers._copies import PoolCopies
from phloem.kvcache.tiers._keys import Keys
from phloem.kvcache.tiers.host import Tier as Host

CPU = torch.device("cpu")


def same(found: list[Any], wanted: list[Any]) -> bool:
    return all(np.array_equal(one, other) for one, other in zip(found, wanted, strict=True))


def read(store: Any, keys: list[bytes]) -> tuple[int, list[Any]]:
    rows = rows_of(len(keys), seed=99)
    count = store.read(keys, rows)
    return count, rows[:count]


# keys


def test_keys_differ_by_whatever_pages_depend_on_and_by_nothing_else() -> None:
    tokens = np.arange(64, dtype=np.int32)

    def chain(made: Keys, name: str, some: Any = tokens) -> list[bytes]:
        found: list[bytes] = []
        made.grow(name, found, some, 2)
        made.grow(name, found, some, 4)
        return found

    plain = chain(Keys(["model a"], 16), "")
    assert plain == chain(Keys(["model a"], 16), "") and len(set(plain)) == 4
    other = tokens.copy()
    other[40] += 1
    assert [one == two for one, two in zip(plain, chain(Keys(["model a"], 16), "", other), strict=True)] == [
        True, True, False, False,
    ]  # fmt: skip
    salted = namespace("salt")
    rest = [chain(Keys(["model b"], 16), ""), chain(Keys(["model a"], 16), salted), chain(Keys(["model", "a"], 16), "")]
    assert not set(plain) & {key for keys in rest for key in keys}
    assert chain(Keys(["model a"], 16), salted) == rest[1]


def test_changed_weights_and_adapters_are_known_to_their_process_alone() -> None:
    tokens = np.arange(32, dtype=np.int32)
    for name in (namespace("", "", "1"), namespace("", "lora#1"), namespace("s", "", "2")):
        chains: list[list[bytes]] = []
        one = Keys(["model"], 16)
        for keys in (one, one, Keys(["model"], 16)):
            found: list[bytes] = []
            keys.grow(name, found, tokens, 2)
            chains.append(found)
        assert chains[0] == chains[1] and not set(chains[0]) & set(chains[2])


# copies


@pytest.mark.parametrize(
    ("spec", "dtype"),
    [
        (Paged(2, 8, 8), torch.float32),
        (Paged(3, 16, 8), torch.bfloat16),
        (Paged(2, 6, 6), torch.int8),
        (Latent(8, 4), torch.float32),
    ],
    ids=str,
)
def test_pages_of_every_layout_come_back_bit_by_bit(spec: MemorySpec, dtype: torch.dtype) -> None:
    pool = KVPool([spec, spec], [9], 4, dtype, CPU)
    for tensor in pool.stored(0):
        tensor.view(torch.uint8).random_(0, 255)
    copies = PoolCopies(pool)
    assert copies.page_bytes == pool.nbytes // 9
    before = [tensor.view(torch.uint8).clone() for tensor in pool.stored(0)]
    rows = rows_of(3, size=rounded(copies.page_bytes))
    pages = np.array([5, 1, 7], np.int32)
    copies.out(pages, rows)
    for tensor in pool.stored(0):
        tensor[1:8].zero_()
    copies.into(rows, np.array([2, 3, 4], np.int32))
    for tensor, old in zip(pool.stored(0), before, strict=True):
        assert torch.equal(tensor.view(torch.uint8)[[2, 3, 4]], old[[5, 1, 7]])
        assert not tensor[[1, 5, 6, 7]].view(torch.uint8).any()


def test_a_row_has_the_page_of_every_group_and_leaves_out_what_a_window_does_not_want() -> None:
    pool = KVPool([Paged(2, 8, 8), Paged(1, 8, 8, window=6), Paged(2, 8, 8)], [9, 5], 4, torch.float32, CPU)
    tensors = [pool.stored(0), pool.stored(1)]
    for tensor in tensors[0] + tensors[1]:
        tensor.random_(1, 1000)
    copies = PoolCopies(pool)
    before = [[tensor.clone() for tensor in group] for group in tensors]
    rows = rows_of(2, size=rounded(copies.page_bytes))
    copies.out(np.array([[5, 7], [1, 3]], np.int32), rows)
    for tensor in tensors[0] + tensors[1]:
        tensor.zero_()
    copies.into(rows, np.array([[2, 3], [0, 4]], np.int32))
    for tensor, old in zip(tensors[0], before[0], strict=True):
        assert torch.equal(tensor[[2, 3]], old[[5, 7]]) and not tensor[[0, 1, 4, 5, 6, 7, 8]].any()
    for tensor, old in zip(tensors[1], before[1], strict=True):
        assert torch.equal(tensor[4], old[3]) and not tensor[:4].any()


# host memory


def test_rows_in_use_stay_and_the_end_of_the_oldest_chain_goes_first() -> None:
    host = Host(Place(BLOCK, 6 * BLOCK))
    first, second = keys_of(3, 1), keys_of(3, 2)
    host.write(first, rows_of(3))
    host.write(second, rows_of(3, 2))
    pinned = host.find(first)
    taken = host.take(2)
    assert host.run(first) == 3 and host.run(second) == 1 and len(taken) == 2
    assert len(host.take(5)) == 1, "three are pinned, two are taken"
    host.unpin(pinned)
    host.check()
    host.clear()
    host.check()
    assert host.empty and host.used == 3


# files


def test_what_was_written_is_found_by_a_later_process(tmp_path: Path) -> None:
    keys, rows = keys_of(40), rows_of(40)
    store = disk_in(tmp_path)
    assert store.write(keys, rows) == 40 and store.exists(keys) == 40
    store.close()
    again = disk_in(tmp_path)
    assert again.exists(keys) == 40 and again.exists(keys_of(3, chain=7)) == 0
    count, found = read(again, keys[3:])
    assert count == 37 and same(found, rows[3:])
    assert again.write(keys, rows) == 40 and again.stats()["pages"] == 40, "they are there already"
    assert again.write(keys_of(5, 3), rows_of(5, 3)) == 5
    again.close()
    last = disk_in(tmp_path)
    assert last.exists(keys) == 40 and last.exists(keys_of(5, 3)) == 5
    last.close()


@pytest.mark.parametrize("cut", [1, 20, 43])
def test_a_torn_index_ends_where_it_is_torn(tmp_path: Path, cut: int) -> None:
    store = disk_in(tmp_path)
    store.write(keys_of(10), rows_of(10))
    store.close()
    (index,) = tmp_path.glob("replica-0/*.idx")
    with index.open("r+b") as file:
        file.truncate(index.stat().st_size - cut)
    again = disk_in(tmp_path)
    assert again.exists(keys_of(10)) == 9
    assert read(again, keys_of(9))[0] == 9
    again.close()


def test_an_index_whose_rows_never_came_is_not_believed(tmp_path: Path) -> None:
    store = disk_in(tmp_path)
    store.write(keys_of(10), rows_of(10))
    store.close()
    (data,) = tmp_path.glob("replica-0/*.kv")
    with data.open("r+b") as file:
        file.truncate(7 * BLOCK + 100)
    again = disk_in(tmp_path)
    assert again.exists(keys_of(10)) == 7
    again.close()


@pytest.mark.parametrize("at", [0, 5, 9])
def test_a_changed_bit_is_a_miss_for_good_and_one_line_of_the_log(
    tmp_path: Path, at: int, caplog: pytest.LogCaptureFixture
) -> None:
    store, keys, rows = disk_in(tmp_path), keys_of(10), rows_of(10)
    store.write(keys, rows)
    (data,) = tmp_path.glob("replica-0/*.kv")
    with data.open("r+b") as file:
        file.seek(at * BLOCK + 1234)
        byte = file.read(1)[0]
        file.seek(at * BLOCK + 1234)
        file.write(bytes([byte ^ 4]))
    with caplog.at_level(logging.WARNING, "phloem.tiers"):
        count, found = read(store, keys)
    assert count == at and same(found, rows[:at]) and store.stats()["corrupt"] == 1
    assert len([one for one in caplog.records if "computed again" in one.message]) == 1
    assert store.exists(keys) == at
    store.close()
    again = disk_in(tmp_path)
    assert again.exists(keys) == at and again.exists(keys[at + 1 :]) == 9 - at
    again.write(keys[at:], rows[at:])
    assert read(again, keys)[0] == 10
    again.close()


def test_words_that_change_places_change_the_checksum() -> None:
    (row,) = rows_of(1, size=8 * BLOCK)
    words, before = row.view(np.uint64), segments.checksum(row)
    for one, other in ((0, 1), (0, 256), (5, 3000)):
        words[[one, other]] = words[[other, one]]
        assert segments.checksum(row) != before
        words[[one, other]] = words[[other, one]]
    assert segments.checksum(row) == before


def test_files_of_others_are_left_alone_and_counted(tmp_path: Path) -> None:
    own = tmp_path / "replica-0"
    own.mkdir()
    foreign = {"notes.txt": b"mine", "segment-00000001.kv": b"x" * 9000, "segment-00000007.idx": b"not an index"}
    for name, data in foreign.items():
        (own / name).write_bytes(data)
    store = disk_in(tmp_path, most=16 * BLOCK)
    assert store.stats()["foreign_files"] == 3
    for chain in range(8):
        assert store.write(keys_of(4, chain), rows_of(4, chain)) == 4
    store.clear()
    store.close()
    assert {name: (own / name).read_bytes() for name in foreign} == foreign
    assert {path.name for path in own.iterdir()} == {*foreign, "lock"}


def test_two_servers_of_one_folder_have_files_of_their_own(tmp_path: Path) -> None:
    one, two = disk_in(tmp_path), disk_in(tmp_path)
    assert one.folder != two.folder
    one.write(keys_of(5), rows_of(5))
    two.write(keys_of(5), rows_of(5, 2))
    two.clear()
    assert read(one, keys_of(5))[0] == 5 and two.exists(keys_of(5)) == 0
    one.close()
    three = disk_in(tmp_path)
    assert three.folder == one.folder and three.exists(keys_of(5)) == 5
    two.close()
    three.close()


def test_beyond_its_room_the_segments_go_that_nobody_asks_for(tmp_path: Path) -> None:
    store = disk_in(tmp_path, most=32 * (BLOCK + 48))
    kept = keys_of(3, 100)
    store.write(kept, rows_of(3))
    for chain in range(30):
        store.write(keys_of(4, chain), rows_of(4, chain))
        assert read(store, kept)[0] == 3
        assert store.nbytes <= 32 * (BLOCK + 48)
        assert sum(path.stat().st_size for path in store.folder.iterdir()) <= 32 * (BLOCK + 48)
    assert store.exists(keys_of(4, 1)) == 0 and store.exists(keys_of(4, 29)) == 4 and store.stats()["evicted"] > 0
    store.close()


def test_pages_of_another_size_count_and_go_first(tmp_path: Path) -> None:
    old = disk_in(tmp_path, size=2 * BLOCK)
    old.write(keys_of(5), rows_of(5, size=2 * BLOCK))
    old.close()
    store = disk_in(tmp_path, most=16 * BLOCK)
    assert store.exists(keys_of(5)) == 0 and store.nbytes > 10 * BLOCK
    for chain in range(4):
        store.write(keys_of(4, chain), rows_of(4, chain))
    assert not old.folder.joinpath("segment-00000001.kv").exists() and store.nbytes <= 16 * BLOCK
    store.close()


def test_a_full_disk_stops_writing_for_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store, now = disk_in(tmp_path), [100.0]
    store.write(keys_of(5), rows_of(5))

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("phloem.kvcache.tiers.disk.monotonic", lambda: now[0])
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, "phloem.tiers"):
        patch.setattr(segments.os, "pwritev", full)
        assert store.write(keys_of(5, 1), rows_of(5)) == 0
        now[0] += 40
        assert store.write(keys_of(5, 1), rows_of(5)) == 0
    assert len(caplog.records) == 1 and "No space" in caplog.text
    assert store.write(keys_of(5, 1), rows_of(5)) == 0, "it rests"
    assert read(store, keys_of(5))[0] == 5
    now[0] += 40
    assert store.write(keys_of(5, 1), rows_of(5)) == 5 and store.stats()["failed"] == 2
    store.close()
    again = disk_in(tmp_path)
    assert again.exists(keys_of(5)) == 5 and again.exists(keys_of(5, 1)) == 5
    again.close()


@pytest.mark.parametrize("call", ["write", "pwritev"])
def test_a_full_disk_is_not_filled_with_empty_files(tmp_path: Path, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`write`: not even the header of an index fits."""
    store, now = disk_in(tmp_path), [100.0]

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("phloem.kvcache.tiers.disk.monotonic", lambda: now[0])
    monkeypatch.setattr(segments.os, call, full)
    for _ in range(3):
        assert store.write(keys_of(5, 1), rows_of(5)) == 0
        now[0] += 40
    assert [path.name for path in store.folder.iterdir()] == ["lock"] and store.stats()["segments"] == 0
    store.close()


def test_what_a_killed_process_had_only_begun_is_removed(tmp_path: Path) -> None:
    own = tmp_path / "replica-0"
    own.mkdir()
    (own / "segment-00000003.idx").write_bytes(b"")
    for path in segments.names(own, 4):
        path.write_bytes(b"")
    rows, index = segments.names(own, 5)
    index.write_bytes(segments.header(BLOCK))
    rows.write_bytes(bytes(BLOCK))  # a row without its record
    store = disk_in(tmp_path)
    assert [path.name for path in own.iterdir()] == ["lock"] and store.stats()["foreign_files"] == 0
    store.close()


def test_what_is_forgotten_behind_a_torn_record_stays_forgotten(tmp_path: Path) -> None:
    store, keys = disk_in(tmp_path), keys_of(10)
    store.write(keys, rows_of(10))
    store.close()
    (index,) = tmp_path.glob("replica-0/*.idx")
    os.truncate(index, index.stat().st_size - 20)
    again = disk_in(tmp_path)
    again.drop(keys[3:5])
    again.close()
    last = disk_in(tmp_path)
    assert last.exists(keys) == 3 and last.exists(keys[5:]) == 4
    last.close()


def test_a_server_whose_folder_was_removed_shares_none_with_the_next(tmp_path: Path) -> None:
    one = disk_in(tmp_path)
    one.write(keys_of(5), rows_of(5))
    shutil.rmtree(tmp_path)
    two = disk_in(tmp_path)
    two.write(keys_of(5, 2), rows_of(5, 2))
    assert read(one, keys_of(5))[0] == 0
    assert one.write(keys_of(5, 1), rows_of(5, 1)) == 5 and one.folder != two.folder
    assert read(one, keys_of(5, 1))[0] == 5 and read(two, keys_of(5, 2))[0] == 5
    three = disk_in(tmp_path)
    assert three.folder not in (one.folder, two.folder)
    for store in (one, two, three):
        store.close()
    again = disk_in(tmp_path)
    assert again.folder == two.folder and read(again, keys_of(5, 2))[0] == 5
    again.close()


def test_a_root_that_cannot_be_had_again_stops_writing_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, now = tmp_path / "store", [100.0]
    store = disk_in(root)
    monkeypatch.setattr("phloem.kvcache.tiers.disk.monotonic", lambda: now[0])
    shutil.rmtree(root)
    root.write_text("a file in its place")
    for _ in range(2):
        assert store.write(keys_of(5), rows_of(5)) == 0
        now[0] += 40
    root.unlink()
    assert store.write(keys_of(5), rows_of(5)) == 5 and read(store, keys_of(5))[0] == 5
    store.close()


def test_a_folder_that_is_removed_is_a_miss_and_comes_again(tmp_path: Path) -> None:
    store = disk_in(tmp_path, most=32 * BLOCK)
    store.write(keys_of(20), rows_of(20))
    shutil.rmtree(tmp_path)
    assert read(store, keys_of(20))[0] == 0 and store.exists(keys_of(1)) == 0
    for chain in range(3):
        store.write(keys_of(8, chain + 1), rows_of(8, chain + 1))
    assert read(store, keys_of(8, 3))[0] == 8
    store.close()


def test_a_folder_that_cannot_be_had_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="extra_config: path"):
        disk_in(tmp_path / "file")


def test_open_files_stay_few_whatever_is_read(tmp_path: Path) -> None:
    store = disk_in(tmp_path, most=128 * BLOCK)
    before = len(os.listdir("/proc/self/fd"))
    for chain in range(12):
        store.write(keys_of(8, chain), rows_of(8, chain))
    for chain in range(12):
        read(store, keys_of(8, chain))
    assert len(os.listdir("/proc/self/fd")) <= before + 2
    store.close()
    assert len(os.listdir("/proc/self/fd")) <= before - 1


@pytest.mark.slow
def test_readers_and_a_writer_at_once_read_what_was_written_or_nothing(tmp_path: Path) -> None:
    store = disk_in(tmp_path, most=48 * BLOCK)
    wrong: list[int] = []
    ended = threading.Event()

    def look() -> None:
        rng = np.random.default_rng(3)
        while not ended.is_set():
            chain = int(rng.integers(0, 40))
            count, found = read(store, keys_of(4, chain))
            if not same(found, rows_of(4, chain)[:count]):
                wrong.append(chain)

    threads = [threading.Thread(target=look) for _ in range(3)]
    for thread in threads:
        thread.start()
    for chain in [*range(40)] * 3:
        store.write(keys_of(4, chain), rows_of(4, chain))
    ended.set()
    for thread in threads:
        thread.join()
    assert not wrong and store.stats()["corrupt"] == 0
    store.close()
