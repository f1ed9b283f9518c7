"""Grammar masks of a step: asked for while the forward pass runs, applied to all rows in one call."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from phloem.engine.memory import is_out_of_memory
from phloem.engine.transfer import plain_up
from phloem.utils import log

if TYPE_CHECKING:
    from collections.abc import Sequence

    from phloem.engine.sampling.slots import Slot
    from phloem.engine.wanted import Up, Wanted
    from phloem.kernels.ops import Ops

_log = log.get("engine.masks")


@dataclass(slots=True)
class Asked:
    """A row that a grammar follows: its positions [start, end) among the step's, and the drafts between them."""

    slot: Slot
    start: int
    end: int
    runs: list[tuple[list[int], list[int]]]  # positions in their order, one more than drafts; of each branch


class Masks:
    """The masks of one runner; used by its thread alone.

    `up` brings a step's masks to the device. `ahead`: the host is idle during the forward pass, so a thread fills them
    then. Where that pass has every core, the same work is done after it.
    """

    def __init__(self, vocab: int, device: torch.device, ops: Ops, ahead: bool, up: Up | None = None) -> None:
        self._up = up or plain_up(device)
        self._ops = ops
        self._vocab, self._words = vocab, (vocab + 31) // 32
        self._buffer = np.zeros((0, self._words), np.int32)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="phloem-masks") if ahead else None
        self._started: Future[dict[int, Exception]] | None = None
        self._asked: list[Asked] = []

    def begin(self, slots: Sequence[Slot], wanted: Wanted) -> None:
        """A step has begun that will choose tokens at these positions, each of the slot in its place."""
        self._started, self._asked = None, []
        if not slots or all(slot.follower is None for slot in slots):
            return
        for start, end in wanted.spans():
            if slots[start].follower is not None:
                runs = [(run, wanted.before(start, run[-1])) for run in wanted.runs(start, end)]
                self._asked.append(Asked(slots[start], start, end, runs))
        count = sum(asked.end - asked.start for asked in self._asked)
        if count > len(self._buffer):
            self._buffer = np.zeros((count, self._words), np.int32)
        if self._pool is not None:
            self._started = self._pool.submit(self._fill, self._asked)

    def apply_(self, logits_LV: Tensor) -> dict[int, Exception]:
        """Forbid what the masks do not allow; position -> why no token can be chosen there."""
        if not self._asked:
            return {}
        failed = self._started.result() if self._started is not None else self._fill(self._asked)
        positions = [position for one in self._asked for position in range(one.start, one.end)]
        kept = [place for place, position in enumerate(positions) if position not in failed]
        if kept:
            rows, mask = self._up([np.array([positions[place] for place in kept], np.int32), self._buffer[kept]])
            if logits_LV.shape[1] > self._vocab:  # an adapter's own tokens, which no grammar knows
                known_LV = logits_LV[:, : self._vocab].contiguous()
                self._ops.mask_tokens_(known_LV, rows, mask)
                logits_LV[:, : self._vocab] = known_LV
                logits_LV[rows.long(), self._vocab :] = float("-inf")
            else:
                self._ops.mask_tokens_(logits_LV, rows, mask)
        return failed

    def drop(self) -> None:
        """The step that began last ends here: whoever fills its masks is waited for."""
        if self._started is not None:
            self._started.exception()
            self._started = None
        self._asked = []

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def _fill(self, rows: Sequence[Asked]) -> dict[int, Exception]:
        """Write each position's mask into its row of the buffer; position -> why it has none."""
        failed: dict[int, Exception] = {}
        place = 0
        for row in rows:
            slot, count = row.slot, row.end - row.start
            buffer = self._buffer[place : place + count]
            buffer[:] = -1  # of what lies behind a refused draft nothing will count
            place += count
            for run, drafts in row.runs:
                sampled, slot.untold = slot.untold, []
                assert slot.follower is not None
                try:
                    masks = slot.follower.masks(sampled, drafts)
                except Exception as error:
                    if is_out_of_memory(error):
                        raise
                    _log.warning("request %s: no mask: %s", slot.request_id, error)
                    failed[row.start] = error
                    break
                for position, mask_W in zip(run, masks, strict=False):
                    if mask_W is None:
                        continue
                    if not mask_W.any():
                        failed[position] = ValueError("the grammar allows no token here")
                        break
                    words = buffer[position - row.start]
                    words[:] = 0
                    words[: len(mask_W)] = mask_W[: self._words]
        return failed
