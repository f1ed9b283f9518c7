"""What towers made of pictures is kept up to a number of bytes, which are those that it takes."""

from __future__ import annotations

import torch

from phloem.engine.towers.media import EncoderCache


def test_parts_of_what_a_tower_made_together_are_counted_as_they_are_held() -> None:
    """A part keeps the whole alive: beside three that have gone it would take four times what it counts."""
    cache = EncoderCache(budget=100 * 4)
    for number in range(8):
        together = torch.full((40, 10), float(number))
        for part, features in enumerate(together.split(10)):
            cache.put(b"%d.%d" % (number, part), features)
    held = {kept.untyped_storage().data_ptr(): kept.untyped_storage().nbytes() for kept in cache._kept.values()}
    assert sum(held.values()) == cache.nbytes <= cache.budget
    kept = cache.get(b"7.3")
    assert kept is not None and torch.equal(kept, torch.full((10, 10), 7.0))
