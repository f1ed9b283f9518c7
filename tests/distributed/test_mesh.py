"""Ranks as axes."""

from __future__ import annotations

import pytest

from phloem.core.errors import ConfigError
from phloem.distributed.mesh import Axis, Mesh


def test_one_rank_is_the_default() -> None:
    assert Mesh() == Mesh.of(0)
    assert Mesh().size == 1


def test_every_rank_has_a_place_of_its_own_and_tp_is_innermost() -> None:
    ranks = [Mesh.of(rank, pp=2, dp=2, cp=1, tp=4) for rank in range(16)]
    assert {mesh.size for mesh in ranks} == {16}
    assert len(set(ranks)) == 16
    assert [mesh.tp.rank for mesh in ranks[:5]] == [0, 1, 2, 3, 0]
    assert [mesh.pp.rank for mesh in ranks] == [0] * 8 + [1] * 8


def test_experts_lie_over_all_ranks_of_a_stage() -> None:
    ranks = [Mesh.of(rank, dp=2, tp=2, ep=2) for rank in range(4)]
    assert [(mesh.ep.rank, mesh.expert_tp.rank) for mesh in ranks] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert ranks[0].expert_tp.size == 2


@pytest.mark.parametrize(("size", "count"), [(7, 2), (8, 4), (3, 4)])
def test_spans_cover_everything_once(size: int, count: int) -> None:
    held = [i for rank in range(count) for i in range(*Axis(count, rank).span(size))]
    assert held == list(range(size))


def test_what_does_not_fit_is_refused_with_what_would() -> None:
    with pytest.raises(ConfigError, match="ep_size 3 does not divide 4 ranks; valid: 1, 2, 4"):
        Mesh.of(0, tp=4, ep=3)
    with pytest.raises(ConfigError, match="rank 4 is outside"):
        Mesh.of(4, tp=4)
    with pytest.raises(ConfigError, match="rank 2 of 2"):
        Axis(2, 2)
