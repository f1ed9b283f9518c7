"""A module with the names and signatures of DeepEP's `Buffer` that computes on the CPU what these are documented to
give: rows and sums go by the communicator that a buffer is made with. It checks what callers owe the package."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

Layout = tuple[Tensor, Tensor | None, Tensor, Tensor, None]


class Config:
    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        return 1000 * hidden_bytes * num_ranks

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        assert hidden_bytes > 0 and num_ranks > 1
        return 0


class Buffer:
    """All ranks are in one machine."""

    made: list[Buffer] = []

    def __init__(
        self,
        group: Any,
        num_nvl_bytes: int = 0,
        num_rdma_bytes: int = 0,
        low_latency_mode: bool = False,
        num_qps_per_rank: int = 24,
        comm: Any = None,
    ) -> None:
        if group is not None or comm is None:
            raise ValueError("Either 'group' or 'comm' must be provided.")
        self.rank, self.group_size, self._comm = comm.Get_rank(), comm.Get_size(), comm
        assert comm.allgather(self.rank) == list(range(self.group_size))
        assert comm.allgather(bytearray([self.rank])) == [bytearray([rank]) for rank in range(self.group_size)]
        assert comm.allgather(b"root" if self.rank == 0 else None)[:2] == [b"root", None]
        self.num_nvl_bytes, self.num_rdma_bytes = num_nvl_bytes, num_rdma_bytes
        self.low_latency_mode, self.num_qps_per_rank = low_latency_mode, num_qps_per_rank
        self.calls: list[str] = []
        self.clean = True
        Buffer.made.append(self)

    def _everywhere(self, thing: Any) -> list[Any]:
        return [pickle.loads(data) for data in self._comm.allgather(pickle.dumps(thing))]

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Config:
        assert num_ranks in (2, 4, 8, 16)
        return Config()

    @staticmethod
    def get_combine_config(num_ranks: int) -> Config:
        return Buffer.get_dispatch_config(num_ranks)

    @staticmethod
    def get_low_latency_rdma_size_hint(
        num_max_dispatch_tokens_per_rank: int, hidden: int, num_ranks: int, num_experts: int
    ) -> int:
        return 4 * num_max_dispatch_tokens_per_rank * hidden * num_ranks * num_experts

    def get_dispatch_layout(self, topk_idx: Tensor, num_experts: int) -> Layout:
        assert topk_idx.dtype == torch.int64 and topk_idx.is_contiguous()
        assert bool(((topk_idx >= -1) & (topk_idx < num_experts)).all())
        each = num_experts // self.group_size
        owner = topk_idx.div(each, rounding_mode="floor")
        there = torch.stack([(owner == rank).any(1) for rank in range(self.group_size)], 1)
        counts = torch.stack([(topk_idx == expert).any(1).sum() for expert in range(num_experts)])
        return there.sum(0).int(), None, counts.int(), there, None

    def dispatch(
        self,
        x: Tensor,
        handle: tuple[Any, ...] | None = None,
        num_tokens_per_rank: Tensor | None = None,
        num_tokens_per_rdma_rank: Tensor | None = None,
        is_token_in_rank: Tensor | None = None,
        num_tokens_per_expert: Tensor | None = None,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, list[int], tuple[Any, ...], None]:
        assert handle is None and num_tokens_per_rdma_rank is None
        assert topk_idx is not None and topk_weights is not None and topk_weights.dtype == torch.float32
        assert num_tokens_per_rank is not None and num_tokens_per_expert is not None and is_token_in_rank is not None
        assert x.is_contiguous() and self.num_nvl_bytes >= 1000 * x.shape[1] * x.itemsize
        assert num_tokens_per_rank.tolist() == is_token_in_rank.sum(0).tolist()
        each = len(num_tokens_per_expert) // self.group_size
        self.calls.append("dispatch")
        self.clean = False
        rows, ids, weights, froms = [], [], [], []
        for x_TN, ids_Tk, weights_Tk, there_Tr in self._everywhere((x, topk_idx, topk_weights, is_token_in_rank)):
            at = there_Tr[:, self.rank].nonzero().view(-1)
            own = ids_Tk[at] - self.rank * each
            mine = (own >= 0) & (own < each)
            rows.append(x_TN[at])
            ids.append(torch.where(mine, own, -1))
            weights.append(torch.where(mine, weights_Tk[at], 0.0))
            froms.append(at)
        found = torch.cat(ids)
        counts = [int((found == expert).sum()) for expert in range(each)]
        return torch.cat(rows), found, torch.cat(weights), counts, (froms, x.shape), None

    def combine(self, x: Tensor, handle: tuple[Any, ...]) -> tuple[Tensor, None, None]:
        froms, shape = handle
        assert x.is_contiguous() and len(x) == sum(map(len, froms))
        self.calls.append("combine")
        total = torch.zeros(shape)
        for parts, origins in self._everywhere((x.split([len(at) for at in froms]), froms)):
            total.index_add_(0, origins[self.rank], parts[self.rank].float())
        return total.to(x.dtype), None, None

    def clean_low_latency_buffer(self, num_max_dispatch_tokens_per_rank: int, hidden: int, num_experts: int) -> None:
        assert min(num_max_dispatch_tokens_per_rank, hidden, num_experts) > 0
        self.calls.append("clean")
        self.clean = True

    def low_latency_dispatch(
        self,
        x: Tensor,
        topk_idx: Tensor,
        num_max_dispatch_tokens_per_rank: int,
        num_experts: int,
        use_fp8: bool = True,
        async_finish: bool = False,
        return_recv_hook: bool = False,
    ) -> tuple[Tensor, Tensor, tuple[Any, ...], None, Callable[[], None]]:
        assert self.low_latency_mode and self.clean and not use_fp8 and not async_finish and return_recv_hook
        assert topk_idx.dtype == torch.int64 and len(x) <= num_max_dispatch_tokens_per_rank
        each = num_experts // self.group_size
        assert self.num_qps_per_rank == each
        room, width = num_max_dispatch_tokens_per_rank * self.group_size, x.shape[1]
        assert self.num_rdma_bytes >= 4 * num_max_dispatch_tokens_per_rank * width * self.group_size * num_experts
        self.calls.append("low_latency_dispatch")
        sent = self._everywhere((x, topk_idx))
        # Nothing is there before the hook has been called, and never anything behind the counted rows.
        rows, counts = torch.full((each, room, width), torch.nan, dtype=x.dtype), torch.full((each,), -1).int()
        origins: list[list[tuple[int, int]]] = []

        def arrive() -> None:
            for at in range(each):
                found = [
                    (rank, int(row))
                    for rank, (_, ids) in enumerate(sent)
                    for row in (ids == self.rank * each + at).any(1).nonzero().view(-1)
                ]
                for place, (rank, row) in enumerate(found):
                    rows[at, place] = sent[rank][0][row]
                counts[at] = len(found)
                origins.append(found)

        return rows, counts, (origins, each), None, arrive

    def low_latency_combine(
        self, x: Tensor, topk_idx: Tensor, topk_weights: Tensor, handle: tuple[Any, ...]
    ) -> tuple[Tensor, None, None]:
        origins, each = handle
        assert topk_weights.dtype == torch.float32 and x.shape[0] == each
        self.calls.append("low_latency_combine")
        total = torch.zeros(len(topk_idx), x.shape[2])
        for rank, (made, places) in enumerate(self._everywhere((x, origins))):
            for at, found in enumerate(places):
                for place, (home, row) in enumerate(found):
                    if home == self.rank:
                        weight = topk_weights[row][topk_idx[row] == rank * each + at].sum()
                        total[row] += weight * made[at, place].float()
        return total.to(x.dtype), None, None


def module() -> ModuleType:
    """What `import deep_ep` would give; `Buffer.made` has none yet."""
    found: Any = ModuleType("deep_ep")
    Buffer.made = []
    found.Buffer = Buffer
    return found
