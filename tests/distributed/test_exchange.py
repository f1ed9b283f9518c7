"""Rows to the ranks of their experts and back: by collectives, and by DeepEP's names over a stand-in of it."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from typing import Any

import deep_ep_stand_in
import pytest
import torch
from share_support import together
from torch import Tensor

from phloem.core.config import Config
from phloem.core.errors import ConfigError
from phloem.distributed import deepep
from phloem.distributed.comm import Comm
from phloem.distributed.deepep import FEW, DeepEP, Teller
from phloem.distributed.exchange import Exchange, Make, Ragged, Routed

N, K, E = 16, 3, 8


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[deep_ep_stand_in.Buffer]]:
    """The package; what it carries is not rounded."""
    monkeypatch.setitem(sys.modules, "deep_ep", deep_ep_stand_in.module())
    monkeypatch.setattr(DeepEP, "carries", torch.float32)
    yield deep_ep_stand_in.Buffer


def rows_of(rank: int, count: int, kind: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, experts (some chosen by nobody) and weights."""
    draw = torch.Generator().manual_seed(rank + 10 * count)
    x = torch.randn(count, N, generator=draw).to(kind)
    ids = torch.stack([torch.randperm(E, generator=draw)[:K] for _ in range(count)]) if count else torch.empty(0, K)
    ids = ids.int()
    if count > 2:
        ids[1, 0], ids[2] = -1, -1
    return x, ids, torch.rand(count, K, generator=draw)


MATRICES = torch.randn(E, N, N, generator=torch.Generator().manual_seed(1)) / N**0.5


def applied(x: Tensor, ids: Tensor, weights: Tensor, own: range) -> Tensor:
    """What these experts make of rows, one at a time."""
    out = torch.zeros(x.shape)
    for row in range(len(x)):
        for expert, weight in zip(ids[row].tolist(), weights[row].tolist(), strict=True):
            if expert in own:
                out[row] += weight * torch.tanh(x[row].float() @ MATRICES[expert])
    return out.to(x.dtype)


def maker(comm: Comm) -> Make:
    each = E // comm.size
    own = range(comm.rank * each, comm.rank * each + each)
    return lambda x, ids, weights: applied(x, ids, weights, own)


def exchange_of(kind: str, comm: Comm) -> Exchange:
    return Ragged(comm) if kind == "torch" else DeepEP(comm, low_latency=kind == "deepep_low_latency")


COUNTS = [(5, 3, 0, 9), (0, 0, 0, 0), (1, 0, 0, 0), (4, 4, 4, 4)]


@pytest.mark.parametrize("kind", ["torch", "deepep", "deepep_low_latency"])
@pytest.mark.parametrize("size", [2, 4])
def test_each_row_has_the_sum_of_its_experts(kind: str, size: int, stand_in: type[deep_ep_stand_in.Buffer]) -> None:
    """Of ranks with many rows, few and none; through the same buffer."""

    def run(comm: Comm) -> list[Tensor]:
        exchange, make = exchange_of(kind, comm), maker(comm)
        found: list[Tensor] = []
        for counts in COUNTS:
            routed = Routed(*rows_of(comm.rank, counts[comm.rank]), E, max(counts[:size]))
            found.append(exchange.start(routed, make)())
        return found

    for rank, found in enumerate(together(size, run)):
        for counts, out in zip(COUNTS, found, strict=True):
            expected = applied(*rows_of(rank, counts[rank]), range(E))
            assert out.shape == expected.shape and out.dtype == expected.dtype
            assert torch.allclose(out, expected, atol=1e-5)
    assert len(stand_in.made) == (0 if kind == "torch" else size), "one buffer for each rank"
    for buffer in stand_in.made:
        assert set(buffer.calls) == (
            {"dispatch", "combine"} if kind == "deepep" else {"low_latency_dispatch", "low_latency_combine"}
        )


def test_steps_of_many_rows_go_by_normal_mode_and_leave_a_clean_buffer(
    stand_in: type[deep_ep_stand_in.Buffer],
) -> None:
    """Which way is the same on all ranks, whatever each has; an expert that weighs what it reads is never in that
    mode, and neither is a step before ranks know of each other."""

    def run(comm: Comm) -> list[bool]:
        exchange, make, agree = DeepEP(comm, low_latency=True), maker(comm), list[bool]()
        for most, weighted in ((FEW, True), (FEW + 1, True), (FEW, True), (FEW, False), (None, True), (3, True)):
            x, ids, weights = rows_of(comm.rank, 3 + comm.rank if most != 3 else 3)
            out = exchange.start(Routed(x, ids, weights, E, most), make, weighted=weighted)()
            agree.append(torch.allclose(out, applied(x, ids, weights, range(E)), atol=1e-5))
        return agree

    assert together(2, run) == [[True] * 6] * 2
    low, normal = ["low_latency_dispatch", "low_latency_combine"], ["dispatch", "combine"]
    for buffer in stand_in.made:
        assert buffer.calls == [*low, *normal, "clean", *low, *normal, *normal, "clean", *low]


def test_rows_travel_in_bfloat16(stand_in: type[deep_ep_stand_in.Buffer], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "deep_ep", deep_ep_stand_in.module())
    assert DeepEP.carries == torch.bfloat16

    def run(kind: str) -> list[Tensor]:
        def work(comm: Comm) -> Tensor:
            return exchange_of(kind, comm).start(Routed(*rows_of(comm.rank, 6), E, 6), maker(comm))()

        return together(2, work)

    plain = run("torch")
    for kind in deepep.NAMES:
        for out, expected in zip(run(kind), plain, strict=True):
            assert out.dtype == expected.dtype and not torch.equal(out, expected)
            assert torch.allclose(out, expected, atol=0.05)


def test_what_ranks_tell_each_other_of_buffers_comes_as_it_was() -> None:
    def run(comm: Comm) -> list[Any]:
        teller = Teller(comm)
        assert (teller.Get_rank(), teller.Get_size()) == (comm.rank, 2)
        return [teller.allgather(thing) for thing in (7 * comm.rank, b"\0" * comm.rank, None, bytearray(b"abc"))]

    for found in together(2, run):
        assert found == [[0, 7], [b"", b"\0"], [None, None], [bytearray(b"abc")] * 2]
        assert all(type(thing) is bytearray for thing in found[-1])


def test_it_is_refused_with_the_reason_and_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"deepep moves rows between NVIDIA's .*, and ranks run on cpu: choose torch"):
        deepep.refuse("deepep", False, "cpu")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs the package deep_ep, which is not installed: build it .*torch"):
        deepep.refuse("deepep_low_latency", True, "cuda")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    deepep.refuse("deepep", True, "cuda")


def test_unknown_names_are_told_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match="'mooncake' is not one of none, torch, deepep, deepep_low_latency"):
        Config.from_flat({"tp": 2, "ep": 2, "attn_dp_size": 2, "moe_a2a_backend": "mooncake"})
