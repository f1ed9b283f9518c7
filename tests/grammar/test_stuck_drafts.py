"""A draft behind which a grammar is stuck: should it be chosen, the request fails as the client's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import pytest

from phloem.core.errors import BadRequest
from phloem.core.request import SamplingParams
from phloem.grammar._follow import Following

STUCK_BEHIND, OTHER = 7, 3


class Matcher:
    """Takes tokens 3 and 7; behind a 7 there is no way on, and no way back either."""

    done = False

    def __init__(self) -> None:
        self.taken: list[int] = []

    def accept(self, ids: Sequence[int]) -> int:
        for count, token in enumerate(ids):
            if STUCK_BEHIND in self.taken or token not in (STUCK_BEHIND, OTHER):
                return count
            self.taken.append(token)
        return len(ids)

    def fill(self, mask: Any) -> None:
        mask[:] = 0 if STUCK_BEHIND in self.taken else (1 << STUCK_BEHIND) | (1 << OTHER)

    def rollback(self, count: int) -> None:
        assert STUCK_BEHIND not in self.taken
        del self.taken[len(self.taken) - count :]


class Vocabulary:
    eos_ids = (0,)

    def new_mask(self) -> Any:
        return np.zeros(1, np.int32)


def follower() -> Following:
    return Following(cast(Any, Matcher), cast(Any, Vocabulary()), SamplingParams(ebnf="root ::= x"))


def test_a_chosen_draft_that_leads_nowhere_is_the_clients_fault() -> None:
    found = follower()
    found.move_to([])
    assert len(found.masks([], [OTHER, STUCK_BEHIND, OTHER])) == 2
    with pytest.raises(BadRequest, match=r"ebnf: .*goes on from here"):
        found.masks([OTHER, STUCK_BEHIND, 30], [])  # what was chosen behind it had no mask


def test_so_it_is_where_the_scheduler_says_the_output() -> None:
    found = follower()
    found.move_to([])
    found.masks([], [STUCK_BEHIND])
    found.move_to([STUCK_BEHIND, 30])
    with pytest.raises(BadRequest, match="goes on from here"):
        found.masks([], [])


def test_where_another_token_was_chosen_the_request_goes_on() -> None:
    found = follower()
    found.move_to([])
    found.masks([], [STUCK_BEHIND])
    assert len(found.masks([OTHER], [OTHER])) == 2
    assert len(found.masks([OTHER, OTHER], [])) == 1
