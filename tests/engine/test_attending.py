"""Which rows of a step a group of ranks attends to, and where its results stand among all."""

from __future__ import annotations

import numpy as np

from phloem.core.batch import Batch
from phloem.engine.inputs import prompt_positions
from phloem.engine.ranks.attending import Part, part_of
from phloem.engine.wanted import Wanted


def step() -> Batch:
    """Rows of slots 3, 0, 2, 5: a decode, a chunk that yields nothing, a prompt with logprobs, and its last chunk."""
    lens = np.array([1, 3, 4, 2], np.int32)
    return Batch(
        step=1,
        slots=np.array([3, 0, 2, 5], np.int32),
        query_lens=lens,
        prefix_lens=np.array([9, 0, 0, 4], np.int32),
        input_ids=np.arange(100, 110, dtype=np.int32),
        tables=(np.arange(8, dtype=np.int32).reshape(4, 2),),
        outputs=np.array([1, 0, 1, 1], np.int32),
        prompt_targets={2: np.array([-1, 7, 8, -1], np.int32), 3: np.array([5, -1], np.int32)},
    )


def of_group(batch: Batch, groups: int, group: int) -> Part:
    return part_of(batch, batch.slots % groups, groups, group)


def test_groups_have_all_rows_of_a_step_and_none_twice() -> None:
    whole = step()
    even, odd = (of_group(whole, 2, group) for group in (0, 1))
    assert even.batch.slots.tolist() == [0, 2] and odd.batch.slots.tolist() == [3, 5]
    assert even.batch.input_ids.tolist() == [*range(101, 108)] and odd.batch.input_ids.tolist() == [100, 108, 109]
    assert even.batch.tables[0].tolist() == [[2, 3], [4, 5]]
    assert even.tokens == odd.tokens == [7, 3] and even.results == odd.results == [3, 3]
    assert set(even.batch.prompt_targets) == {1} and set(odd.batch.prompt_targets) == {1}


def test_results_of_all_groups_stand_where_the_step_wants_them() -> None:
    whole = step()
    given: list[int] = []  # tokens whose states each group gives, one group behind the other
    for group in (0, 1, 2):
        part = of_group(whole, 3, group)
        index = part.wanted.at
        if part.batch.prompt_targets:
            index = np.concatenate([index, prompt_positions(part.batch)])
        given += part.batch.input_ids[index].tolist()
    expected = whole.input_ids[np.concatenate([Wanted.of(whole).at, prompt_positions(whole)])]
    assert np.array(given)[of_group(whole, 3, 0).order].tolist() == expected.tolist() == [100, 107, 109, 105, 106, 108]


def test_a_group_may_have_nothing() -> None:
    part = of_group(step(), 7, 6)
    assert part.batch.num_rows == part.batch.num_tokens == 0 and part.tokens[6] == part.results[6] == 0
