"""Rows of a step by whose weights they are computed: what is picked of a batch, and heads of several vocabularies."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from phloem.core.batch import Batch, Embeds
from phloem.engine.towers.media import Pictures
from phloem.engine.wanted import Wanted
from phloem.engine.wearing import Ends, picked, pictures_of, split, tokens_of

LENS = [3, 1, 2, 4]


def batch() -> Batch:
    lens, ints = np.array(LENS, np.int32), np.int32
    return Batch(
        step=1,
        slots=np.array([4, 7, 2, 0], ints),
        query_lens=lens,
        prefix_lens=np.array([0, 9, 5, 8], ints),
        input_ids=np.arange(100, 110, dtype=ints),
        tables=(np.arange(8, dtype=ints).reshape(4, 2),),
        outputs=np.array([1, 1, 0, 1], ints),
        prompt_targets={0: np.array([5, 6, -1], ints), 3: np.array([1, 2, 3, 4], ints)},
        adapters=np.array([0, 2, 2, 1], ints),
        embeds=[Embeds(1, np.ones((2, 8), np.float32)), Embeds(7, np.zeros((2, 8), np.float32))],
        positions=np.arange(30).reshape(3, 10),
    )


def test_picked_rows_are_what_they_were_in_the_whole_batch() -> None:
    part = picked(batch(), np.array([1, 3]))
    assert part.slots.tolist() == [7, 0] and part.query_lens.tolist() == [1, 4] and part.prefix_lens.tolist() == [9, 8]
    assert part.input_ids.tolist() == [103, 106, 107, 108, 109] and part.tables[0].tolist() == [[2, 3], [6, 7]]
    assert part.positions is not None and part.positions[1].tolist() == [13, 16, 17, 18, 19]
    assert part.adapters is not None and part.adapters.tolist() == [2, 1]
    assert {row: targets.tolist() for row, targets in part.prompt_targets.items()} == {1: [1, 2, 3, 4]}
    assert [(one.start, len(one.values)) for one in part.embeds] == [(2, 2)]
    assert Wanted.of(part).at.tolist() == [0, 4]
    alone = picked(batch(), np.array([0]))
    assert alone.adapters is None and [one.start for one in alone.embeds] == [1]


def test_every_token_is_in_one_part() -> None:
    whole = batch()
    parts = [tokens_of(whole, np.array(rows)) for rows in ([0, 2], [1], [3])]
    assert sorted(np.concatenate(parts).tolist()) == list(range(10))
    assert parts[0].tolist() == [0, 1, 2, 4, 5]


def test_pictures_go_with_their_rows() -> None:
    whole = batch()
    seen = Pictures(torch.tensor([1, 2, 7, 8]), torch.arange(4.0).unsqueeze(1), 1, [(1, 2, 3), (7, 2, 11)])
    part = pictures_of(seen, tokens_of(whole, np.array([1, 3])), 10)
    assert part is not None and part.index.tolist() == [2, 3] and part.values.flatten().tolist() == [2.0, 3.0]
    assert part.spans == [(2, 2, 11)]
    assert pictures_of(seen, tokens_of(whole, np.array([1, 2])), 10) is None


class Wardrobe:
    """Adapter 2 has a head of two tokens more, adapter 3 one of its own; 1 is of linear layers."""

    def __init__(self) -> None:
        self.worn = 0

    def owners(self, entries: Any) -> list[int]:
        return [] if entries is None else [entry for entry in (2, 3) if entry in entries]

    def tokens(self, entry: int) -> int:
        return 6 if entry == 2 else 5 if entry == 3 else 4

    @contextmanager
    def wearing(self, entry: int) -> Iterator[None]:
        self.worn = entry
        yield
        self.worn = 0


def test_each_position_has_the_head_of_its_adapter_and_no_token_of_others() -> None:
    wardrobe = Wardrobe()

    def head(hidden_LN: torch.Tensor) -> torch.Tensor:
        width = 6 if wardrobe.worn == 2 else 4
        return hidden_LN[:, :1] + 10.0 * wardrobe.worn + torch.arange(float(width))

    model: Any = SimpleNamespace(vocab_size=4, head=head, greedy=lambda hidden: head(hidden).argmax(-1).int())
    ends, hidden_LN = Ends(model, wardrobe), torch.arange(5.0).unsqueeze(1)
    entries = np.array([0, 2, 1, 3, 2], np.int32)
    assert [(entry, places.tolist()) for entry, places in split(wardrobe, entries)] == [
        (0, [0, 2]), (2, [1, 4]), (3, [3])
    ]  # fmt: skip
    logits = ends.logits(hidden_LN, entries)
    assert logits.shape == (5, 6) and logits[[0, 2, 3], 4:].isneginf().all()
    assert logits[:, 0].tolist() == [0.0, 21.0, 2.0, 33.0, 24.0] and logits[1, 5] == 26.0
    assert ends.greedy(hidden_LN, entries).tolist() == [3, 5, 3, 3, 5]
    assert ends.logits(hidden_LN, None).shape == (5, 4) and wardrobe.worn == 0
    row = ends.of_row(hidden_LN[:2], 3)
    assert row.shape == (2, 5) and bool((row[:, 4] < row[:, 3] - 1000).all()) and bool(row.isfinite().all())
    assert ends.of_row(hidden_LN[:2], 1).shape == (2, 4)
    whole = batch()
    assert ends.entries(whole, Wanted.of(whole)) is not None and ends.tokens(whole) == {7: 6, 2: 6, 0: 4}
    plain = picked(whole, np.array([0, 3]))
    assert ends.entries(plain, Wanted.of(plain)) is None and ends.tokens(plain) == {}
