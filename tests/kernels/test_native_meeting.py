"""Sums over ranks as native calls: alone, in recorded steps, in pieces, and where another rank does not come."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from linear_cases import Source, needs_native

from phloem.core.errors import EngineDead
from phloem.distributed import shm
from phloem.distributed.shm import SharedMemory
from phloem.kernels import native
from phloem.kernels.ops import Ops
from phloem.kernels.reference import embedding

pytestmark = needs_native


def among(size: int, place: Path, work: Callable[[SharedMemory], Any], patience: float = 20.0) -> list[Any]:
    """What `work` gives on each rank, in threads; what it raises is given too."""
    found: list[Any] = [None] * size

    def one(rank: int) -> None:
        try:
            found[rank] = work(SharedMemory(rank, size, place / "meeting", patience))
        except BaseException as error:
            found[rank] = error

    threads = [threading.Thread(target=one, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return found


def values(rank: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(rank + 1))


_ONE_AT_A_TIME = threading.Lock()  # of one process: its ranks are processes elsewhere


def recorded(comm: SharedMemory, ops: Ops, most: int, n: int) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """A step of up to `most` rows: silu, a sum, an addition, another sum. Its graph, its input, its result. `ops`: made
    before any rank waits, which the number of threads would wait for."""
    x = torch.zeros(most, 2 * n)

    def step(sizes: tuple[int, ...]) -> torch.Tensor:
        first = comm.all_reduce(ops.silu_and_mul(x[: sizes[0]]))
        return comm.all_reduce(ops.add(first, first))

    with _ONE_AT_A_TIME:
        assert ops.recorder is not None
        graph, out = ops.recorder().record_sizes(step, (most,))
    return graph, x, out


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("place", [shm.PLACE, 256], ids=["whole", "pieces"])
def test_a_recorded_step_sums_anew_in_each_replay(
    size: int, place: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of any number of rows; beside calls that are not recorded, which meet in the same places."""
    monkeypatch.setattr(shm, "PLACE", place)
    ops = native.table(1)

    def work(comm: SharedMemory) -> list[torch.Tensor]:
        graph, x, out = recorded(comm, ops, 40, 24)
        found: list[torch.Tensor] = []
        for turn, rows in enumerate((40, 1, 7, 40, 3)):
            x[:rows] = values(10 * turn + comm.rank, rows, 48)
            graph.replay(rows)
            comm.check()
            found.append(out[:rows].clone())
            found.append(comm.all_reduce(values(turn + comm.rank, 5, 3)))
            found.append(comm.all_gather(values(comm.rank, 2))[size - 1])
        assert comm.spent is not None and comm.spent.calls == 15
        assert 0 < comm.spent.waited <= comm.spent.seconds and comm.spent.bytes == 4 * (2 * 91 * 24 + 5 * 15)
        return found

    ranks = among(size, tmp_path, work)
    for turn, rows in enumerate((40, 1, 7, 40, 3)):
        parts = [ops.silu_and_mul(values(10 * turn + rank, rows, 48)) for rank in range(size)]
        torch.testing.assert_close(ranks[0][3 * turn], sum(parts) * 2 * size, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ranks[0][3 * turn + 1], sum(values(turn + rank, 5, 3) for rank in range(size)))
        assert torch.equal(ranks[0][3 * turn + 2], values(size - 1, 2))
    for other in ranks[1:]:
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(ranks[0], other, strict=True))


def test_the_bits_are_those_of_the_calls_that_are_not_native(tmp_path: Path) -> None:
    def work(comm: SharedMemory) -> tuple[torch.Tensor, torch.Tensor]:
        ours = comm.all_reduce(values(comm.rank, 33, 17))
        comm._sum = None  # pyright: ignore[reportPrivateUsage]
        return ours, comm.all_reduce(values(comm.rank, 33, 17))

    for ours, plain in among(3, tmp_path, work):
        assert torch.equal(ours, plain)


@pytest.mark.parametrize(
    ("how", "why"), [("ends", "the group was ended"), ("stays away", r"rank 1 did not come within 4 s")]
)
def test_a_replay_that_finds_nobody_ends_and_is_told(how: str, why: str, tmp_path: Path) -> None:
    gate, ops = threading.Event(), native.table(1)

    def work(comm: SharedMemory) -> None:
        graph, _, _ = recorded(comm, ops, 40, 24)
        graph.replay(3)
        comm.check()
        if comm.rank == 1:
            if how == "ends":
                comm.abort()
            gate.wait(20)
            return
        try:
            graph.replay(40)  # both of its sums: the second does not wait again
            with pytest.raises(EngineDead):
                comm.all_reduce(torch.ones(3))
            comm.check()
        finally:
            gate.set()

    first, second = among(2, tmp_path, work, 4.0)
    assert second is None and isinstance(first, EngineDead)
    with pytest.raises(EngineDead, match=why):
        raise first


@pytest.mark.parametrize("kind", [torch.int64, torch.int32])
def test_parts_of_a_vocabulary_make_up_the_whole(kind: torch.dtype) -> None:
    """The rows of a part, and nothing for ids of others; the same in a recorded step."""
    ops = native.table(2, float32=True)
    assert ops.embedding_part is not None and ops.recorder is not None
    whole = values(1, 37, 48)
    spans = [(0, 16), (16, 32), (32, 37)]
    parts = [
        ops.prepare_linear([Source.dense_of(whole[first:last].clone())], torch.float32, torch.device("cpu"))
        for first, last in spans
    ]
    ids = torch.tensor([0, 15, 16, 36, 31, 32, 5, 16], dtype=kind)
    found = [ops.embedding_part(ids, part, 1.0, *span) for part, span in zip(parts, spans, strict=True)]
    for rows, (first, last) in zip(found, spans, strict=True):
        here = (ids >= first) & (ids < last)
        assert torch.equal(rows[here], whole[ids[here].long()]) and not rows[~here].any()
    assert torch.equal(sum(found), embedding(ids.long(), whole, 1.0))
    scaled = ops.embedding_part(ids, parts[1], 2.0, *spans[1])
    assert torch.equal(scaled, 2 * found[1])
    if kind == torch.int64:
        graph, out = ops.recorder().record(lambda: ops.embedding_part(ids, parts[2], 1.0, *spans[2]))  # type: ignore[misc]
        ids.copy_(torch.tensor([33, 0, 36, 1, 35, 34, 2, 32]))
        graph.replay()
        assert torch.equal(out, ops.embedding_part(ids, parts[2], 1.0, *spans[2]))
