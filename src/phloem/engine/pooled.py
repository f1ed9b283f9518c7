"""Steps of a model that does not generate: whole texts in, one result each; nothing is kept, no page is taken.

Such a model has one group of memory, of states without tensors: what the scheduler counts is how many texts run.
"""

from __future__ import annotations

from time import perf_counter
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from phloem.attention._packed import PackedMemory
from phloem.core.errors import BadRequest
from phloem.core.memory import Group
from phloem.engine.pipeline import Flight
from phloem.engine.sampling.answer import empty
from phloem.engine.thread import Launched, Order, StepThread
from phloem.layers.context import ForwardBatch

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from phloem.core.batch import Batch, Follower, StepOutput
    from phloem.engine.pipeline import Settle
    from phloem.kernels.ops import Ops
    from phloem.models._pooled import PooledModel
    from phloem.platforms._facts import StepFacts

T = TypeVar("T")
SLOTS_EACH = 2  # of state: what a running request holds, by the cache's rule


class PooledWork:
    """How one step is computed, by the thread that runs the steps."""

    def __init__(self, model: PooledModel, ops: Ops, max_slots: int) -> None:
        self._model, self._ops = model, ops
        self._second = np.zeros(max_slots, dtype=np.int32)  # by slot: where a text's second segment begins; 0: nowhere

    def forget(self) -> None:
        self._second[:] = 0

    def begin(self, order: Order, settle: Settle) -> Flight:
        """Give a step to the device."""
        start, batch = perf_counter(), order.batch
        for admission in batch.admissions:
            self._second[admission.slot] = admission.second
        step = self._step(batch)
        settle()
        lengths: list[int] = batch.query_lens.tolist()
        found = self._model.forward(step, lengths)
        output = empty(batch)

        def land() -> StepOutput:
            values = found.cpu().numpy()
            if len(values) == batch.num_rows:
                output.pooled = {row: values[row] for row in range(batch.num_rows)}
            else:
                ends = np.cumsum(batch.query_lens).tolist()
                output.pooled = {row: values[end - lengths[row] : end] for row, end in enumerate(ends)}
            for row, one in output.pooled.items():
                if not np.isfinite(one).all():
                    output.failed[row] = "the model's results are not numbers (NaN)"
            output.forward_seconds = output.total_seconds = perf_counter() - start
            return output

        return Flight(land, lambda: True)

    def _step(self, batch: Batch) -> ForwardBatch:
        device, lens = self._model.device, batch.query_lens
        starts = np.cumsum(lens) - lens
        places = np.arange(batch.num_tokens) - np.repeat(starts, lens)
        seconds, types = self._second[batch.slots], None
        if seconds.any():
            turn = np.repeat(seconds, lens)
            types = torch.from_numpy(((turn > 0) & (places >= turn)).astype(np.int64)).to(device)
        ids = torch.from_numpy(batch.input_ids.astype(np.int64)).to(device)
        memory = PackedMemory(self._ops, lens.tolist())
        return ForwardBatch(ids, torch.from_numpy(places).to(device), memory, None, types=types)


def run_texts(model: PooledModel, ops: Ops, lengths: list[int]) -> None:
    """Texts of these lengths, of one token again and again, for what computing them makes ready."""
    count = sum(lengths)
    places = np.concatenate([np.arange(length) for length in lengths])
    ids = torch.zeros(count, dtype=torch.int64, device=model.device)
    with torch.inference_mode():
        memory = PackedMemory(ops, lengths)
        model.forward(ForwardBatch(ids, torch.from_numpy(places).to(model.device), memory, None), lengths)


class PooledRunner:
    """One model that does not generate (`core.batch.Runner`). Every row of a batch is a whole text."""

    groups: tuple[Group, ...] = (Group("state", 0, ()),)
    draft_room = 0
    graph_bytes = 0

    def __init__(
        self,
        model: PooledModel,
        ops: Ops,
        max_slots: int,
        *,
        facts: StepFacts,
        give_back: Callable[[], None] | None = None,
        begin: Callable[[], None] | None = None,
        kernels: Callable[[], dict[str, Any]] | None = None,
    ) -> None:
        self.model, self.max_slots, self._kernels = model, max_slots, kernels
        self.page_size = 16  # no page is ever taken
        self.num_pages: tuple[int, ...] = (SLOTS_EACH * max_slots + 1,)
        work = PooledWork(model, ops, max_slots)
        self._steps = StepThread(
            work.begin, lambda batch: False, work.forget, give_back=give_back, idle=None, settles=facts.on_host
        )
        self._steps.start(begin)

    @property
    def prepared(self) -> dict[str, Any]:
        return {"graphs": {}} if self._kernels is None else {"graphs": {}, "kernels": self._kernels()}

    @property
    def busy_since(self) -> float:
        """perf_counter at which the oldest step in progress began; 0 when idle."""
        return self._steps.busy_since

    def launch(self, batch: Batch) -> Launched[StepOutput]:
        return self._steps.launch(Order(batch, {}))

    def constrain(self, slot: int, follower: Follower | None) -> None:
        """Nothing follows what is not generated."""

    def between(self, work: Callable[[], T]) -> Launched[T]:
        return self._steps.between(work)

    def read_weight(self, name: str, rows: int) -> NDArray[np.float32]:
        index = self.model.index
        if name not in index.names():
            raise BadRequest(f"no weight is called {name!r:.200}", param="name")
        return index.get(name, rows).float().cpu().numpy()

    def make_resident(self, limit: int, stopped: Callable[[], bool]) -> int:
        """Nothing is kept."""
        return 0

    def close(self) -> None:
        """End the thread after the steps that were launched."""
        self._steps.close()
