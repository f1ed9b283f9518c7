"""A stand-in for torch's `ProcessGroupNCCL` on the processor, of the calls that are made of it, by ranks in threads."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import torch

from phloem.distributed.comm import Threads
from phloem.distributed.nccl import Nccl


class Store:
    """Where the ranks of one group meet."""

    def __init__(self, size: int, timeout: float) -> None:
        self.barrier = threading.Barrier(size, timeout=timeout)
        self.places: list[Any] = [None] * size

    def all(self, rank: int, value: Any) -> list[Any]:
        """What each rank has brought; torch raises a RuntimeError where one does not come."""
        try:
            self.places[rank] = value
            self.barrier.wait()
            found = list(self.places)
            self.barrier.wait()
        except threading.BrokenBarrierError:
            raise RuntimeError("NCCL communicator was aborted\nand more") from None
        return found


class Group:
    """Each call is over when it returns, as if the stream had come to it."""

    Options = SimpleNamespace

    def __init__(self, store: Store, rank: int, size: int, options: Any) -> None:
        self.options, self.calls, self.waits = options, list[str](), 0
        self._store, self._rank, self._size = store, rank, size

    def _done(self, name: str) -> Any:
        self.calls.append(name)

        def wait() -> None:
            self.waits += 1

        return SimpleNamespace(wait=wait)

    def allreduce(self, tensors: list[torch.Tensor], options: Any) -> Any:
        assert not options.asyncOp
        (x,) = tensors
        parts = self._store.all(self._rank, x.clone())
        x.copy_(torch.stack(parts).float().sum(0))
        return self._done("allreduce")

    def _allgather_base(self, into: torch.Tensor, x: torch.Tensor, options: Any) -> Any:
        assert not options.asyncOp
        assert into.is_contiguous() and x.is_contiguous() and into.numel() == x.numel() * self._size
        into.copy_(torch.stack(self._store.all(self._rank, x.clone())))
        return self._done("_allgather_base")

    def broadcast(self, tensors: list[torch.Tensor], options: Any) -> Any:
        assert not options.asyncOp
        (x,) = tensors
        x.copy_(self._store.all(self._rank, x.clone())[options.rootRank])
        return self._done("broadcast")

    def alltoall_base(
        self, into: torch.Tensor, x: torch.Tensor, mine: list[int], yours: list[int], options: Any
    ) -> Any:
        parts = self._store.all(self._rank, x.split(yours))
        into.copy_(torch.cat([parts[rank][self._rank] for rank in range(self._size)]))
        assert [len(parts[rank][self._rank]) for rank in range(self._size)] == mine
        return self._done("alltoall_base")

    def abort(self) -> None:
        self._store.barrier.abort()


class Lost(Group):
    def __init__(self, *arguments: Any) -> None:
        raise RuntimeError("no route\nand a trace")


def group(size: int, timeout: float) -> list[Nccl]:
    """The ends of `size` ranks, one for each thread."""
    store, found, hosts = Store(size, timeout), list[Any]([None] * size), Threads.group(size, timeout)

    def join(rank: int) -> None:
        found[rank] = Nccl(rank, size, store, torch.device("cpu"), timeout, hosts[rank], Group)

    threads = [threading.Thread(target=join, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout)
    return found
