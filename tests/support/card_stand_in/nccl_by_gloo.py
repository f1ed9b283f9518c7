"""A stand-in for torch's `ProcessGroupNCCL` for ranks that are processes: its calls go by gloo, over the host's memory
under the stand-in's tensors. Each one first says what it is, and how large: ranks that call different things are told,
where NCCL would stand still."""

from __future__ import annotations

import os
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import distributed as dist
from torch_npu import on_host

_TORCH: Any = dist
Tensor = torch.Tensor


def _host(x: Tensor) -> Tensor:
    assert x.device.type == "npu", f"a tensor of {x.device} is given to cards"
    assert x.is_contiguous()
    return on_host(x)


class Group:
    Options = SimpleNamespace

    def __init__(self, store: Any, rank: int, size: int, options: Any) -> None:
        kind = _TORCH.ProcessGroupGloo
        made = kind._Options()
        made._timeout = timedelta(seconds=600)  # a card waits for ever
        made._devices = [kind.create_device(hostname="127.0.0.1")]
        self._rank, self._size, self._number, self._ended = rank, size, 0, False
        self._group = kind(store, rank, size, made)

    def _same(self, name: str, x: Tensor | None, options: Any) -> None:
        assert options.asyncOp is False
        self._number += 1
        while self._rank and "CARDS_HANG" in os.environ and Path(os.environ["CARDS_HANG"]).exists():
            time.sleep(0.1)  # as a card would that never gets so far
        shape = [] if x is None else [_types.index(x.dtype), *x.shape]
        mine = torch.tensor([self._number, sum(map(ord, name)), *shape, *[-1] * 8][:8])
        found = [torch.empty_like(mine) for _ in range(self._size)]
        self._wait(self._group.allgather([found], [mine]))
        if any(not torch.equal(mine, one) for one in found):
            raise RuntimeError(f"ranks call different things: {name}, {[one.tolist() for one in found]}")

    def allreduce(self, tensors: list[Tensor], options: Any) -> None:
        (x,) = tensors
        self._same("allreduce", x, options)
        host = _host(x)
        parts = [torch.empty_like(host) for _ in range(self._size)]
        self._group.allgather([parts], [host]).wait()
        host.copy_(torch.stack(parts).float().sum(0))

    def _allgather_base(self, into: Tensor, x: Tensor, options: Any) -> None:
        self._same("allgather", x, options)
        self._group.allgather([list(_host(into).view(self._size, *x.shape).unbind(0))], [_host(x)]).wait()

    def broadcast(self, tensors: list[Tensor], options: Any) -> None:
        (x,) = tensors
        self._same("broadcast", x, options)
        plain = dist.BroadcastOptions()
        plain.rootRank = options.rootRank
        self._group.broadcast([_host(x)], plain).wait()

    def alltoall_base(self, into: Tensor, x: Tensor, mine: list[int], yours: list[int], options: Any) -> None:
        self._same("alltoall", None, options)
        self._group.alltoall_base(_host(into), _host(x), mine, yours, dist.AllToAllOptions()).wait()

    def _wait(self, work: Any) -> None:
        """For the others, who may never come."""
        while not self._ended:
            try:
                work.wait(timedelta(seconds=0.25))
                return
            except RuntimeError:
                if work.is_completed():
                    raise
        raise RuntimeError("the communicator was aborted")

    def abort(self) -> None:
        self._ended = True
        self._group.abort()


_types = (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.float64)
