"""Which tokens of a step each of several ranks computes, and where they stand among all."""

from __future__ import annotations

import numpy as np
import pytest

from phloem.core.batch import Batch
from phloem.engine.inputs import prompt_positions
from phloem.engine.ranks.contexts import pieces, share_of
from phloem.engine.wanted import Wanted


def step(lens: list[int], prefix: list[int], outputs: list[int]) -> Batch:
    """Rows of slots 0, 1, ..; tokens 100, 101, ..; row r has the pages 10 r, 10 r + 1, .."""
    rows = len(lens)
    return Batch(
        step=1,
        slots=np.arange(rows, dtype=np.int32),
        query_lens=np.array(lens, np.int32),
        prefix_lens=np.array(prefix, np.int32),
        input_ids=np.arange(100, 100 + sum(lens), dtype=np.int32),
        tables=(np.arange(rows, dtype=np.int32)[:, None] * 10 + np.arange(8, dtype=np.int32),),
        outputs=np.array(outputs, np.int32),
    )


def test_a_long_row_goes_to_and_fro_over_the_ranks_and_short_ones_stay_whole() -> None:
    lens, owners = pieces(np.array([16, 3, 1, 9], np.int32), np.array([0, 1, 2, 3], np.int32), 2)
    assert lens.tolist() == [4, 4, 4, 4, 3, 1, 2, 2, 2, 3]
    assert owners.tolist() == [0, 1, 1, 0, 1, 0, 0, 1, 1, 0]


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_ranks_have_as_many_pairs_of_queries_and_keys_one_as_the_other(ranks: int) -> None:
    """Of a chunk behind a cached beginning too."""
    for prefix in (0, 500):
        lens, owners = pieces(np.array([240 * ranks], np.int32), np.zeros(1, np.int32), ranks)
        ends = prefix + np.cumsum(lens)
        pairs = np.zeros(ranks)
        for count, end, owner in zip(lens, ends, owners, strict=True):
            pairs[owner] += sum(range(end - count + 1, end + 1))
        assert pairs.max() / pairs.min() < 1.001


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_all_ranks_together_have_every_token_once_at_its_position(ranks: int) -> None:
    batch = step([13, 1, 24, 1], [4, 30, 0, 7], [0, 1, 1, 1])
    batch.prompt_targets[2] = np.arange(24, dtype=np.int32) % 3 - 1
    shares = [share_of(batch, ranks, rank) for rank in range(ranks)]
    assert not any(share.filled for share in shares)
    gathered = np.concatenate([share.part.batch.input_ids for share in shares])
    positions: dict[int, tuple[int, int]] = {}
    for rank, share in enumerate(shares):
        own = share.part.batch
        assert share.part.tokens == shares[0].part.tokens and share.order.tolist() == shares[0].order.tolist()
        assert share.part.tokens[rank] == own.num_tokens
        starts = np.cumsum(own.query_lens) - own.query_lens
        for row in range(own.num_rows):
            assert own.tables[0][row].tolist() == batch.tables[0][own.slots[row]].tolist()
            for at in range(own.query_lens[row]):
                token = int(own.input_ids[starts[row] + at])
                positions[token] = int(own.slots[row]), int(own.prefix_lens[row] + at)
    assert gathered[shares[0].order].tolist() == batch.input_ids.tolist()
    expected = [(row, prefix + at) for row, prefix, count in ((0, 4, 13), (1, 30, 1), (2, 0, 24), (3, 7, 1))
                for at in range(count)]  # fmt: skip
    assert [positions[token] for token in batch.input_ids.tolist()] == expected
    given: list[int] = []
    for rank, share in enumerate(shares):
        own = share.part.batch
        index = share.part.wanted.at
        if own.prompt_targets:
            index = np.concatenate([index, prompt_positions(own)])
        assert len(index) == share.part.results[rank]
        given += own.input_ids[index].tolist()
    wanted = np.concatenate([Wanted.of(batch).at, prompt_positions(batch)])
    assert np.array(given)[shares[0].part.order].tolist() == batch.input_ids[wanted].tolist()


def test_a_rank_for_which_nothing_is_left_has_a_token_of_nobody() -> None:
    batch = step([1, 3], [9, 0], [1, 0])
    batch.slots[:] = [2, 4]  # both are rank 0's
    shares = [share_of(batch, 2, rank) for rank in range(2)]
    idle = shares[1].part.batch
    assert shares[1].filled and not shares[0].filled
    assert (idle.num_rows, idle.num_tokens, int(idle.outputs[0])) == (1, 1, 0) and not idle.tables[0].any()
    assert shares[0].part.tokens == shares[1].part.tokens == [4, 1] and shares[1].part.results == [1, 0]
    gathered = np.concatenate([share.part.batch.input_ids for share in shares])
    assert gathered[shares[0].order].tolist() == batch.input_ids.tolist()
    assert gathered[shares[1].order].tolist() == [*batch.input_ids.tolist(), 0], "what it writes to scratch memory"


def test_fillers_of_ranks_before_push_tokens_on() -> None:
    batch = step([1, 1], [3, 4], [1, 1])
    batch.slots[:] = [1, 3]
    shares = [share_of(batch, 4, rank) for rank in range(4)]
    assert [share.filled for share in shares] == [True, False, True, False]
    gathered = np.concatenate([share.part.batch.input_ids for share in shares])
    assert gathered[shares[1].order].tolist() == [100, 101]
    assert shares[0].part.tokens == [1, 1, 1, 1] and shares[0].part.results == [0, 1, 0, 1]
