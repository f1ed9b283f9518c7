"""Grammar masks of a step: asked for while the forward pass runs, applied to all rows in one call."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from phloem.engine.memory import is_out_of_memory
from phloem.utils import log

if TYPE_CHECKING:
    from collections.abc import Sequence

    from phloem.engine.slots import Slot
    from phloem.kernels.ops import Ops

_log = log.get("engine.masks")


class Masks:
    """The masks of one runner; used by its thread alone.

    On a device the host is idle during the forward pass, so a thread fills them then (`ahead`). On a CPU that pass has
    every core: the same work is done after it.
    """

    def __init__(self, max_slots: int, vocab: int, device: torch.device, ops: Ops) -> None:
        self._device = device
        self._ops = ops
        self._buffer = np.zeros((max_slots, (vocab + 31) // 32), dtype=np.int32)
        self._pool = None if device.type == "cpu" else ThreadPoolExecutor(1, thread_name_prefix="phloem-masks")
        self._started: Future[dict[int, Exception]] | None = None
        self._rows: list[int] = []

    def begin(self, slots: Sequence[Slot]) -> None:
        """A step has begun that will sample for these slots, in this order."""
        self._rows = [row for row, slot in enumerate(slots) if slot.mask is not None]
        self._started = None
        if self._rows and self._pool is not None:
            self._started = self._pool.submit(self._fill, [slots[row] for row in self._rows])

    def apply_(self, slots: Sequence[Slot], logits_LV: Tensor) -> dict[int, Exception]:
        """Forbid what the masks do not allow; row -> why that row failed. Row i of the logits is slot i of `begin`."""
        if not self._rows:
            return {}
        failed = self._started.result() if self._started is not None else self._fill([slots[r] for r in self._rows])
        kept = [place for place in range(len(self._rows)) if place not in failed]
        if kept:
            rows = torch.tensor([self._rows[place] for place in kept], dtype=torch.int32)
            mask = torch.from_numpy(self._buffer[kept])
            self._ops.mask_tokens_(logits_LV, rows.to(self._device), mask.to(self._device))
        return {self._rows[place]: error for place, error in failed.items()}

    def drop(self) -> None:
        """The step that began last ends here: whoever fills its masks is waited for."""
        if self._started is not None:
            self._started.exception()
            self._started = None
        self._rows = []

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def _fill(self, slots: list[Slot]) -> dict[int, Exception]:
        """Write each slot's mask into its row of the buffer; place -> why it has none."""
        failed: dict[int, Exception] = {}
        for place, slot in enumerate(slots):
            assert slot.mask is not None
            sampled, slot.since_mask = slot.since_mask, []
            row = self._buffer[place]
            try:
                mask_W = slot.mask(sampled)
                if mask_W is None:
                    row[:] = -1
                    continue
                if not mask_W.any():
                    raise ValueError("the grammar allows no token here")
                row[:] = 0
                row[: len(mask_W)] = mask_W[: len(row)]
            except Exception as error:
                if is_out_of_memory(error):
                    raise
                _log.warning("request %s: no mask: %s", slot.request_id, error)
                failed[place] = error
        return failed
