"""Collectives: every member gives the same sums, and lets nobody wait for a rank that has gone."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nccl_stand_in
import pytest
import torch
from torch import distributed as dist

from phloem.core.errors import ConfigError, EngineDead
from phloem.distributed import shm
from phloem.distributed.choose import choose
from phloem.distributed.comm import Comm, Gloo, Threads
from phloem.distributed.nccl import Nccl
from phloem.distributed.shm import SharedMemory

KINDS = ["threads", "shm", "gloo", "nccl"]  # the last one over a stand-in for torch's group


def ends(kind: str, size: int, folder: Path, timeout: float = 20.0) -> list[Callable[[], Comm]]:
    """What makes each rank's end, in its own thread: the members for processes serve threads as well."""
    if kind == "threads":
        return [lambda end=end: end for end in Threads.group(size, timeout)]
    if kind == "nccl":
        return [lambda end=end: end for end in nccl_stand_in.group(size, timeout)]
    member = SharedMemory if kind == "shm" else Gloo
    return [lambda rank=rank: member(rank, size, folder / "meeting", timeout) for rank in range(size)]


def run(makers: list[Callable[[], Comm]], work: Callable[[Comm], Any]) -> list[Any]:
    found: list[Any] = [None] * len(makers)

    def one(number: int) -> None:
        try:
            found[number] = work(makers[number]())
        except BaseException as error:
            found[number] = error

    threads = [threading.Thread(target=one, args=(number,), daemon=True) for number in range(len(makers))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    return found


def values(rank: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(rank + 1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [2, 3])
def test_every_rank_has_the_same_sum(kind: str, size: int, tmp_path: Path) -> None:
    def work(comm: Comm) -> list[torch.Tensor]:
        found = []
        for count in range(20):  # of many shapes, one behind the other
            x = values(comm.rank, count, 5)
            kept = x.clone()
            found.append(comm.all_reduce(x[:, 1:]))
            assert kind == "nccl" or torch.equal(x, kept), "what a rank brings is not changed, but by a card"
        half = comm.all_reduce(values(comm.rank, 7).to(torch.bfloat16))
        assert half.dtype == torch.bfloat16
        return [*found, half.float()]

    ranks = run(ends(kind, size, tmp_path), work)
    for count in range(20):
        total = sum(values(rank, count, 5)[:, 1:] for rank in range(size))
        torch.testing.assert_close(ranks[0][count], total)
    for other in ranks[1:]:
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(ranks[0], other, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_each_rank_has_the_rows_that_it_is_given_and_there_may_be_none(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = 3
    monkeypatch.setattr(shm, "PLACE", 40)  # several pieces, whose borders lie within rows

    def part(source: int, to: int, turn: int) -> torch.Tensor:
        return values(10 * source + to, 0 if turn == 2 else (source * 2 + to * 3 + turn) % 5, 3)

    def work(comm: Comm) -> Any:
        found = [comm.all_to_all([part(comm.rank, to, turn) for to in range(size)]) for turn in range(4)]
        ids = comm.all_to_all([torch.full((to, 2), comm.rank) for to in range(size)])
        return found, ids

    for rank, (found, ids) in enumerate(run(ends(kind, size, tmp_path), work)):
        for turn, parts in enumerate(found):
            assert all(torch.equal(parts[source], part(source, rank, turn)) for source in range(size))
        assert [x.tolist() for x in ids] == [[[source] * 2] * rank for source in range(size)]


@pytest.mark.parametrize("kind", KINDS)
def test_parts_are_gathered_in_order_and_rank_0_is_heard_by_all(kind: str, tmp_path: Path) -> None:
    def work(comm: Comm) -> Any:
        whole = comm.all_gather(values(comm.rank, 3, 4))
        first = comm.gather(values(comm.rank, 2).double())
        said = comm.broadcast(values(7, 5, 2) if comm.rank == 0 else torch.zeros(5, 2))
        empty = comm.all_reduce(torch.zeros(0, 3))
        return whole, first, said, empty

    ranks = run(ends(kind, 3, tmp_path), work)
    for rank, (whole, first, said, empty) in enumerate(ranks):
        assert all(torch.equal(part, values(other, 3, 4)) for other, part in enumerate(whole))
        assert torch.equal(said, values(7, 5, 2)) and empty.shape == (0, 3)
        assert (first is None) == (rank > 0)
    assert torch.equal(torch.cat(ranks[0][1]), torch.cat([values(rank, 2) for rank in range(3)]).double())


def test_what_is_larger_than_a_place_goes_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shm, "PLACE", 64)

    def work(comm: Comm) -> Any:
        return comm.all_reduce(values(comm.rank, 9, 11)), comm.all_gather(values(comm.rank, 50))

    (total, parts), (again, _) = run(ends("shm", 2, tmp_path), work)
    torch.testing.assert_close(total, values(0, 9, 11) + values(1, 9, 11))
    assert torch.equal(total, again) and torch.equal(parts[1], values(1, 50))


@pytest.mark.parametrize("kind", KINDS)
def test_nobody_waits_once_the_group_was_ended(kind: str, tmp_path: Path) -> None:
    def work(comm: Comm) -> None:
        if comm.rank == 1:
            time.sleep(0.1)
            comm.abort()
            return
        comm.all_reduce(torch.ones(3))

    began = time.monotonic()
    assert isinstance(run(ends(kind, 2, tmp_path), work)[0], EngineDead)
    assert time.monotonic() - began < 20


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["threads", "shm", "gloo"])
def test_a_rank_that_does_not_come_in_time_is_told(kind: str, tmp_path: Path) -> None:
    gate = threading.Event()

    def work(comm: Comm) -> None:
        if comm.rank == 1:
            gate.wait(10)
            return
        try:
            comm.all_reduce(torch.ones(3))
        finally:
            gate.set()

    assert isinstance(run(ends(kind, 2, tmp_path, 0.5), work)[0], EngineDead)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["shm", "gloo"])
def test_processes_meet(kind: str, tmp_path: Path) -> None:
    code = textwrap.dedent(f"""
        import sys, pathlib, torch
        from phloem.distributed.choose import connect
        comm = connect({kind!r}, int(sys.argv[1]), 2, pathlib.Path({str(tmp_path)!r}) / "meeting", 30.0)
        x = torch.full((4, 4), 1.0 + comm.rank)
        for _ in range(500):
            total = comm.all_reduce(x)
            assert (total == 3).all()
        print(float(total.sum()), comm.name)
    """)
    ranks = [subprocess.Popen([sys.executable, "-c", code, str(n)], stdout=subprocess.PIPE, text=True) for n in (0, 1)]
    assert [rank.communicate(timeout=60)[0].split() for rank in ranks] == [["48.0", kind]] * 2


def test_the_choice_says_why() -> None:
    assert choose("auto", "x86_64", "linux")[0] == "shm"
    name, why = choose("auto", "aarch64", "linux")
    assert name == "gloo" and "aarch64" in why
    assert choose("gloo", "x86_64", "linux") == ("gloo", "as asked")
    with pytest.raises(ConfigError, match="tp_comm: shm needs"):
        choose("shm", "aarch64", "linux")


def test_what_is_asked_of_nccl_a_graph_can_capture(tmp_path: Path) -> None:
    """Each call is put on the stream once, with no more than the ranks' own tensors; nothing is read back, and the
    first one, which makes the connections, is over when a rank has joined."""
    made = nccl_stand_in.group(2, 20.0)
    assert [end._group.calls for end in made] == [["allreduce"]] * 2  # pyright: ignore[reportPrivateUsage]

    def work(comm: Comm) -> Comm:
        comm.all_reduce(torch.ones(3))
        comm.all_gather(torch.ones(3))
        comm.gather(torch.ones(2))
        comm.broadcast(torch.ones(2))
        return comm

    for end in run([lambda end=end: end for end in made], work):
        assert end._group.calls[1:] == ["allreduce", "_allgather_base", "_allgather_base", "broadcast"]
        assert end._group.waits == 5 and end.records
        assert end._group.options._timeout.total_seconds() == 20.0


@pytest.mark.parametrize("name", ["allreduce", "_allgather_base", "broadcast", "alltoall_base", "abort"])
def test_torch_has_the_calls_that_the_stand_in_has(name: str) -> None:
    assert callable(getattr(dist.ProcessGroup, name)) and callable(getattr(nccl_stand_in.Group, name))


def test_ranks_that_do_not_find_each_other_by_nccl_are_told() -> None:
    with pytest.raises(EngineDead, match="did not find each other: no route"):
        Nccl(0, 2, object(), torch.device("cpu"), 1.0, Threads.group(2)[0], nccl_stand_in.Lost)
