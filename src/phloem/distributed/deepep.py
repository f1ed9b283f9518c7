"""Rows to the ranks of their experts, and sums back, by DeepEP (https://github.com/deepseek-ai/DeepEP): its kernels
move them between graphics cards, over NVLink in a machine and RDMA beyond it. Written to the documented names of its
`Buffer` (`docs/legacy.md` there); the package is imported with the first buffer.

*Normal*: a rank is given each row that has one of its experts once, and gives back its sum. *Low latency*: each expert
has room for the rows of all ranks, of which a rank may have `FEW`; what experts give is weighted where it comes back.
Both carry bfloat16.

Legend: T tokens of this rank, R rows that it is given, N width, k experts of a token, E experts of all ranks.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

import msgspec
import torch

from phloem.core.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from phloem.distributed.comm import Comm
    from phloem.distributed.exchange import Make, Routed

PACKAGE = "deep_ep"
NAMES = ("deepep", "deepep_low_latency")  # of `moe_a2a_backend`
FEW = 128  # rows of a rank up to which a step goes by low latency: what its buffers have room for


def refuse(backend: str, reaches: bool, device: str) -> None:
    """Raises ConfigError where rows cannot go that way. `reaches`: whether the package moves rows between devices of
    that kind."""
    if not reaches:
        why = f"{backend} moves rows between NVIDIA's graphics cards, and ranks run on {device}"
        raise ConfigError(f"moe_a2a_backend: {why}: choose torch, or none", param="moe_a2a_backend")
    if not installed():
        why = f"{backend} needs the package {PACKAGE}, which is not installed"
        remedy = "build it as https://github.com/deepseek-ai/DeepEP says, or choose torch"
        raise ConfigError(f"moe_a2a_backend: {why}: {remedy}", param="moe_a2a_backend")


def installed() -> bool:
    """Whether the package is there; it is not imported here."""
    return importlib.util.find_spec(PACKAGE) is not None


class _Thing(msgspec.Struct, array_like=True):
    """What ranks tell each other of their buffers: a number, bytes, or nothing. `mutable`: bytes as a bytearray."""

    value: int | bytes | None
    mutable: bool


class Teller:
    """What a buffer asks of an `mpi4py.MPI.Comm`, over a group of ours on the host: so that it needs no group of the
    caller's torch.distributed. Nothing is unpickled."""

    def __init__(self, comm: Comm) -> None:
        self._comm = comm.host

    def Get_rank(self) -> int:
        return self._comm.rank

    def Get_size(self) -> int:
        return self._comm.size

    def allgather(self, thing: int | bytes | bytearray | None) -> list[int | bytes | bytearray | None]:
        """What each rank has, in their order."""
        value = bytes(thing) if isinstance(thing, bytearray) else thing
        data = msgspec.msgpack.encode(_Thing(value, isinstance(thing, bytearray)))
        sizes = [int(size) for size in self._comm.all_gather(torch.tensor([len(data)]))]
        padded = torch.frombuffer(bytearray(data.ljust(max(sizes), b"\0")), dtype=torch.uint8)
        found: list[int | bytes | bytearray | None] = []
        for size, part in zip(sizes, self._comm.all_gather(padded), strict=True):
            told = msgspec.msgpack.decode(part[:size].numpy().tobytes(), type=_Thing)
            found.append(bytearray(told.value) if told.mutable and isinstance(told.value, bytes) else told.value)
        return found


class DeepEP:
    """One rank's end (`distributed.exchange.Exchange`), for all layers of a model.

    Args:
        low_latency: steps in which no rank has more than `FEW` rows go that way, the others by normal mode.
    """

    carries = torch.bfloat16

    def __init__(self, comm: Comm, *, low_latency: bool = False) -> None:
        self._comm, self._low_latency = comm, low_latency
        self._buffers: dict[tuple[int, int], Any] = {}  # by (N, E)
        self._used: set[tuple[int, int]] = set()  # those that normal mode has written to since they were clean

    def start(self, routed: Routed, make: Make, /, *, weighted: bool = True) -> Callable[[], Tensor]:
        """As `Exchange`."""
        shape = routed.x_TN.shape[1], routed.experts
        if shape not in self._buffers:
            self._buffers[shape] = self._made(*shape)
        buffer, few = self._buffers[shape], routed.most is not None and routed.most <= FEW
        if not (self._low_latency and weighted and few):
            self._used.add(shape)
            return self._normal(buffer, routed, make)
        if shape in self._used:
            buffer.clean_low_latency_buffer(FEW, *shape)
            self._used.discard(shape)
        return self._low(buffer, routed, make)

    def _made(self, width: int, experts: int) -> Any:
        module: Any = importlib.import_module(PACKAGE)
        kind, size = module.Buffer, self._comm.size
        row = width * self.carries.itemsize
        configs = kind.get_dispatch_config(size), kind.get_combine_config(size)
        near = max(config.get_nvl_buffer_size_hint(row, size) for config in configs)
        far = max(config.get_rdma_buffer_size_hint(row, size) for config in configs)
        if not self._low_latency:
            return kind(None, near, far, comm=Teller(self._comm))
        far = max(far, kind.get_low_latency_rdma_size_hint(FEW, width, size, experts))
        each = experts // size
        return kind(None, near, far, low_latency_mode=True, num_qps_per_rank=each, comm=Teller(self._comm))

    def _normal(self, buffer: Any, routed: Routed, make: Make) -> Callable[[], Tensor]:
        ids, weights = routed.ids_Tk.long(), routed.weights_Tk.float()
        ranks, nodes, experts, there, _ = buffer.get_dispatch_layout(ids, routed.experts)
        x_RN, own_Rk, weights_Rk, _, handle, _ = buffer.dispatch(
            routed.x_TN.to(self.carries).contiguous(),
            num_tokens_per_rank=ranks,
            num_tokens_per_rdma_rank=nodes,
            is_token_in_rank=there,
            num_tokens_per_expert=experts,
            topk_idx=ids,
            topk_weights=weights,
        )
        kind = routed.x_TN.dtype

        def end() -> Tensor:
            # The package counts a rank's experts from 0.
            ids_Rk = torch.where(own_Rk >= 0, own_Rk + self._first(routed.experts), -1)
            made = make(x_RN.to(kind), ids_Rk.to(routed.ids_Tk.dtype), weights_Rk.to(routed.weights_Tk.dtype))
            return buffer.combine(made.to(self.carries).contiguous(), handle)[0].to(kind)

        return end

    def _low(self, buffer: Any, routed: Routed, make: Make) -> Callable[[], Tensor]:
        ids, weights, kind = routed.ids_Tk.long(), routed.weights_Tk.float(), routed.x_TN.dtype
        x_eRN, counts_e, handle, _, arrive = buffer.low_latency_dispatch(
            routed.x_TN.to(self.carries).contiguous(), ids, FEW, routed.experts, use_fp8=False, return_recv_hook=True
        )

        def end() -> Tensor:
            arrive()
            counts, first = counts_e.tolist(), self._first(routed.experts)
            rows = torch.cat([part[:count] for part, count in zip(x_eRN, counts, strict=True)])
            own = torch.repeat_interleave(torch.arange(first, first + len(counts)), torch.tensor(counts))
            own_R1 = own[:, None].to(routed.ids_Tk)
            made = make(rows.to(kind), own_R1, torch.ones_like(own_R1, dtype=routed.weights_Tk.dtype))
            back = torch.zeros_like(x_eRN)
            for into, count, part in zip(back, counts, made.split(counts), strict=True):
                into[:count] = part
            return buffer.low_latency_combine(back, ids, weights, handle)[0].to(kind)

        return end

    def _first(self, experts: int) -> int:
        """The number of this rank's first expert."""
        return self._comm.rank * (experts // self._comm.size)
