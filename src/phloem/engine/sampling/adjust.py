"""What changes logits before tokens are chosen from them, each position as if the drafts before it were output.

In this order: penalties, logit bias, tokens forbidden for now; grammar masks; custom processors.

Legend: L positions, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from phloem.engine.memory import is_out_of_memory
from phloem.utils import log

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from phloem.engine.sampling.masks import Masks
    from phloem.engine.sampling.slots import Slot
    from phloem.engine.wanted import Wanted

_log = log.get("engine.adjust")


def adjust_(logits_LV: Tensor, slots: Sequence[Slot], wanted: Wanted, masks: Masks) -> None:
    """Change the logits in place; what fails for one row is noted in `wanted` for it alone.

    `slots`: of each position.
    """
    starts: dict[int, int] = {}  # position -> the first one of its row
    for start, end in wanted.spans():
        slot = slots[start]
        if slot.plain:
            continue
        for position in range(start, end):
            starts[position] = start
            before = wanted.before(start, position)
            try:
                _adjust_row_(slot, int(wanted.known[position]) - slot.num_prompt, before, logits_LV[position])
            except Exception as error:
                if is_out_of_memory(error):
                    raise
                _log.exception("request %s: its logits could not be prepared", slot.request_id)
                wanted.fail(start, position, error)
    for position, error in masks.apply_(logits_LV).items():
        wanted.fail(starts[position], position, error)
    for position, start in starts.items():
        slot = slots[position]
        if slot.params.processors and start not in wanted.errors:
            before = wanted.before(start, position)
            try:
                slot.process_(logits_LV[position][: slot.vocab], before)
            except Exception as error:
                if is_out_of_memory(error):
                    raise
                _log.warning("request %s: a logit processor failed: %s", slot.request_id, error)
                wanted.fail(start, position, error)


def _adjust_row_(slot: Slot, generated: int, drafts: Sequence[int], logits_V: Tensor) -> None:
    """`generated`: how many tokens this request has produced so far, `drafts` among them."""
    if slot.penalties is not None:
        slot.penalties.apply_(logits_V, drafts)
    if slot.bias is not None:
        logits_V.index_add_(0, *slot.bias)
    if generated < slot.params.min_new_tokens and slot.eos is not None:
        logits_V.index_fill_(0, slot.eos, float("-inf"))
