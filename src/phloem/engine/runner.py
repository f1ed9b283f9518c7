"""Executes steps on a device, in the order of `launch`, in a thread of its own: the scheduler plans meanwhile.

Legend: R rows, T packed new tokens, L positions whose logits are wanted, V vocabulary.
"""

from __future__ import annotations

import gc
import queue
import threading
from time import perf_counter
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from phloem.core.batch import PositionLogprobs, StepOutput
from phloem.core.errors import BadRequest, OutOfMemory
from phloem.engine.candidates import Candidates
from phloem.engine.decode import DecodeGraphs, run_forward
from phloem.engine.flight import Flight, Here, Known, Pipeline, plain_up
from phloem.engine.inputs import device_inputs, prompt_rows
from phloem.engine.logprobs import position_logprobs
from phloem.engine.masks import Masks
from phloem.engine.memory import first_line, is_out_of_memory
from phloem.engine.sampler import sample
from phloem.engine.slots import Slot, Slots
from phloem.utils import log

if TYPE_CHECKING:
    from collections.abc import Callable

    from phloem.attention import AttentionBackend
    from phloem.core.batch import Batch
    from phloem.engine.flexible import FlexibleSteps
    from phloem.engine.pieces import PieceGraphs
    from phloem.kernels.ops import Ops
    from phloem.kvcache.pool import KVPool
    from phloem.models import Model
    from phloem.platforms._streams import Arriving, Streams

    Coming = Arriving | Here | Known

_log = log.get("engine.runner")

T = TypeVar("T")
Index = np.ndarray[Any, np.dtype[np.int64]]
Ids = np.ndarray[Any, np.dtype[np.int32]]

# Logits of prompt positions are made in pieces of this many, so that a long prompt's do not all exist at once.
HEAD_ROWS = 256

# Up to so many rows are sampled from the head's best tokens alone. With more, writing whole rows and looking through
# them costs less than picking the candidates while they are made: `phloem bench kernels` shows both.
FEW_ROWS = 4


class Launched:
    """A step in the runner's queue or on the device (`core.batch.Pending`).

    Whoever waits takes a lock that its end lets go: an event would make such a lock for each wait, in Python.
    """

    def __init__(self) -> None:
        self._running = threading.Lock()
        self._running.acquire()
        self._output: StepOutput | None = None
        self._error: BaseException | None = None

    def set(self, output: StepOutput) -> None:
        self._output = output
        self._running.release()

    def fail(self, error: BaseException) -> None:
        self._error = error
        self._running.release()

    def done(self) -> bool:
        return self._output is not None or self._error is not None

    def wait(self, timeout: float) -> bool:
        """Wait up to `timeout` seconds; True when the step has ended."""
        ended = self._running.acquire(timeout=timeout)
        if ended:
            self._running.release()
        return ended

    def result(self) -> StepOutput:
        with self._running:
            pass
        if self._error is not None:
            raise self._error
        assert self._output is not None
        return self._output


class ModelRunner:
    """One model on one device, with its KV pool (`core.batch.Runner`).

    `give_back` frees what the device's allocator keeps without using it, after a step ran out of memory. `begin` is
    called once in the thread that runs the steps.
    """

    def __init__(
        self,
        model: Model,
        backend: AttentionBackend,
        pool: KVPool,
        ops: Ops,
        max_slots: int,
        graphs: DecodeGraphs | None = None,
        streams: Streams | None = None,
        give_back: Callable[[], None] | None = None,
        pieces: PieceGraphs | FlexibleSteps | None = None,
        begin: Callable[[], None] | None = None,
    ) -> None:
        self.model = model
        self.pool = pool
        self.groups, self.num_pages = pool.groups, pool.num_pages
        self.page_size = pool.page_size
        self.max_slots = max_slots
        self._backend = backend
        self._ops = ops
        self._graphs = graphs
        self._give_back = give_back
        self._closed_epoch = -1  # batches up to this one's epoch were launched before a failure was known
        self._pieces = pieces
        self._up = streams.up if streams is not None else plain_up(pool.device)
        self._down = streams.down if streams is not None else Here
        # On a CPU a recording costs as much as a step, and would take the cores of whatever else runs here.
        idle = self._record_idle if (graphs or pieces) is not None and streams is not None else None
        on_host = streams is None and pool.device.type == "cpu"
        self._pipeline = Pipeline(self._begin, self._needs_values, idle, settles=on_host)
        self._slots = Slots(max_slots, model.vocab_size, pool.device)
        self._host_tokens: Index | None = self._slots.last_tokens.numpy() if on_host else None
        self._masks = Masks(max_slots, model.vocab_size, pool.device, ops)
        self._queue: queue.SimpleQueue[tuple[Batch, Launched] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, args=(begin,), name="phloem-runner", daemon=True)
        self._thread.start()

    def launch(self, batch: Batch) -> Launched:
        pending = Launched()
        self._queue.put((batch, pending))
        return pending

    def close(self) -> None:
        """End the thread after the steps that were launched."""
        self._queue.put(None)
        self._thread.join(timeout=30)
        self._masks.close()

    @property
    def busy_since(self) -> float:
        """perf_counter at which the oldest step in progress began; 0 when idle."""
        return self._pipeline.busy_since

    @property
    def graph_bytes(self) -> int:
        """Memory that recorded steps take."""
        return sum(table.nbytes for table in (self._graphs and self._graphs.graphs, self._pieces) if table is not None)

    def drop_graphs(self) -> None:
        """Forget recorded steps because weights moved in memory. Between steps, with none launched."""
        if self._graphs is not None:
            self._graphs.graphs.drop()
        if self._pieces is not None:
            self._pieces.drop()

    def _record_idle(self) -> bool:
        """Record one more step; decode steps first. False when there is nothing to record."""
        if self._graphs is not None and self._graphs.graphs.idle():
            return True
        return self._pieces is not None and self._pieces.graphs.idle()

    def _work(self, begin: Callable[[], None] | None) -> None:
        if begin is not None:
            begin()
        with torch.inference_mode():
            self._pipeline.run(self._queue)

    def _needs_values(self, batch: Batch) -> bool:
        ids = batch.slots[self._slots.follows[batch.slots]]
        fresh = {admission.slot for admission in batch.admissions}
        return any(slot not in fresh and self._slots[slot].follows for slot in ids.tolist())

    def _begin(self, batch: Batch) -> Flight:
        """Give a step to the device; what it gives is read when the flight lands.

        Raises:
            OutOfMemory: for this step, and for those of its epoch behind it.
        """
        if batch.epoch <= self._closed_epoch:
            raise OutOfMemory("launched behind a step that ran out of memory")
        flight = self._saved(batch.epoch, lambda: self._start(batch))
        return Flight(lambda: self._saved(batch.epoch, flight.land), flight.ready)

    def _saved(self, epoch: int, work: Callable[[], T]) -> T:
        """Do a part of a step; when there is no memory for it, forget the step, and free what can be freed."""
        try:
            return work()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            why = first_line(error)
        # Only here, where the error and the tensors that its frames hold have gone, can they be given back.
        self._closed_epoch = epoch
        self._masks.drop()
        self._slots.clear()
        gc.collect(1)  # the young objects only: all of them take half a second
        if self._give_back is not None:
            self._give_back()
        raise OutOfMemory(why)

    def _start(self, batch: Batch) -> Flight:
        start = perf_counter()
        for admission in batch.admissions:
            self._slots.admit(admission)
        sampled = np.flatnonzero(batch.sample)
        ids = batch.slots[sampled]
        easy = bool(self._slots.easy[ids].all())
        slots = [] if easy else [self._slots[slot] for slot in ids.tolist()]
        self._masks.begin(slots)
        output = StepOutput(batch.step, np.full(batch.num_rows, -1, np.int32))
        before = perf_counter()
        hidden_LN = self._forward(batch)
        count = len(ids)
        coming: Coming | None = None
        if count and (easy or self._slots.argmax_only[ids].all()):
            tokens_L = self.model.greedy(hidden_LN[:count])
            output.forward_seconds = perf_counter() - before
            coming = self._keep(ids, tokens_L, hidden_LN[:count].sum(-1))
        elif count:
            coming = self._sample_few(batch, sampled, slots, ids, hidden_LN[:count], output)
            if coming is None:
                logits_LV = self.model.head(hidden_LN[:count])
                output.forward_seconds = perf_counter() - before
                coming = self._sample(batch, sampled, slots, ids, logits_LV, output)
            else:
                output.forward_seconds = perf_counter() - before
        else:
            output.forward_seconds = perf_counter() - before
        for i, slot in enumerate(slots):
            if slot.return_hidden:
                output.hidden[int(sampled[i])] = hidden_LN[i].to("cpu", torch.float32).numpy().copy()
        if batch.prompt_targets:
            self._prompt_logprobs(batch, hidden_LN[count:], output)

        def land() -> StepOutput:
            if coming is not None:
                _give_out(sampled, slots, coming, output)
            output.total_seconds = perf_counter() - start
            return output

        return Flight(land, coming.done if coming is not None else lambda: True)

    def _forward(self, batch: Batch) -> Tensor:
        """Hidden states of the wanted positions: by a recorded step or its pieces where they serve, else eagerly."""
        last_tokens = self._slots.last_tokens
        if self._graphs is not None and batch.is_decode and not batch.prompt_targets:
            hidden_RN = self._graphs.run(batch, last_tokens, self._up, self._pipeline.settle)
            if hidden_RN is not None:
                return hidden_RN
        inputs = device_inputs(batch, self.page_size, last_tokens, self._up)
        self._pipeline.settle()
        # A decode step without a graph of its own will have one soon, unless none are made.
        if self._pieces is not None and (self._graphs is None or not batch.is_decode):
            hidden_LN = self._pieces.run(inputs)
            if hidden_LN is not None:
                return hidden_LN
        return run_forward(self.model, self._backend, self.pool, inputs, inputs.logit_index)

    def _sample_few(
        self, batch: Batch, rows: Index, slots: list[Slot], ids: Ids, hidden_LN: Tensor, output: StepOutput
    ) -> Coming | None:
        """As `_sample`, from the best tokens of each row, without whole rows; None where some row wants its own."""
        wanted = self._slots.candidates[ids]
        vocab = self.model.vocab_size
        if len(wanted) > FEW_ROWS or not wanted.all():
            return None
        settings = self._slots.columns.rows(ids, (batch.prefix_lens + batch.query_lens)[rows])
        scale_LJ = Candidates.scales(settings, any(slot.return_logprob for slot in slots))
        norms = scale_LJ.shape[1]
        best = self.model.best(hidden_LN, min(int(wanted.max()), vocab), scale_LJ if norms else None, norms)
        if best is None:
            return None
        few = Candidates(*best)
        tokens_L = few.draw(settings, vocab, self._ops, self._up)
        whole = np.flatnonzero(~few.sure(settings, vocab))
        logits_WV: Tensor | None = None
        if len(whole):
            index = torch.from_numpy(whole)
            logits_WV = self.model.head(hidden_LN[index])
            tokens_L[index] = sample(logits_WV, settings.of_rows(whole), self._ops, self._up)
        coming = self._keep(ids, tokens_L, few.sums_LJ[:, 0] if norms else hidden_LN.sum(-1))
        places = {int(i): place for place, i in enumerate(whole)}
        for i, slot in enumerate(slots):
            if not slot.return_logprob:
                continue
            place = places.get(i)
            if place is None or logits_WV is None:
                output.logprobs[int(rows[i])] = few.logprobs(i, int(tokens_L[i]), slot)
            else:
                one = slice(place, place + 1)
                output.logprobs[int(rows[i])] = position_logprobs(
                    logits_WV[one], tokens_L[i : i + 1], slot.top_logprobs, (), self._ops
                )[0]
        return coming

    def _sample(
        self, batch: Batch, rows: Index, slots: list[Slot], ids: Ids, logits_LV: Tensor, output: StepOutput
    ) -> Coming:
        """Choose a token for every sampling row; what fails for one row is noted for it alone."""
        known = (batch.prefix_lens + batch.query_lens)[rows]
        wanted = [i for i, slot in enumerate(slots) if slot.return_logprob]
        raw_LV = logits_LV
        if not all(slot.plain for slot in slots):
            raw_LV = logits_LV.clone() if wanted else logits_LV
            self._adjust_(slots, rows, known, logits_LV, output)
        tokens_L = sample(logits_LV, self._slots.columns.rows(ids, known), self._ops, self._up)
        for i, slot in enumerate(slots):
            if slot.penalties is not None:
                slot.penalties.add(tokens_L[i])
        chosen_L = logits_LV.gather(1, tokens_L.unsqueeze(1)).squeeze(1)
        coming = self._keep(ids, tokens_L, chosen_L)
        for i in wanted:
            slot = slots[i]
            output.logprobs[int(rows[i])] = position_logprobs(
                raw_LV[i : i + 1], tokens_L[i : i + 1], slot.top_logprobs, slot.token_ids_logprob, self._ops
            )[0]
        return coming

    def _keep(self, ids: Ids, tokens_L: Tensor, sound_L: Tensor) -> Coming:
        """Keep the tokens for the next step, and send them and whether each row is sound on their way to the host."""
        if self._host_tokens is not None:
            values = tokens_L.numpy()
            self._host_tokens[ids] = values
            return Known([values, torch.isnan(sound_L).numpy()])
        (index,) = self._up([ids.astype(np.int64)])
        self._slots.last_tokens[index] = tokens_L.long()
        return self._down([tokens_L.to(torch.int32), torch.isnan(sound_L)])

    def _adjust_(
        self,
        slots: list[Slot],
        rows: Index,
        known: Ids,
        logits_LV: Tensor,
        output: StepOutput,
    ) -> None:
        for i, slot in enumerate(slots):
            if slot.plain:
                continue
            try:
                _adjust_row_(slot, int(known[i]) - slot.num_prompt, logits_LV[i])
            except Exception as error:
                if is_out_of_memory(error):
                    raise
                _log.exception("request %s: its logits could not be prepared", slot.request_id)
                output.failed[int(rows[i])] = f"{type(error).__name__}: {error}"
        for i, error in self._masks.apply_(slots, logits_LV).items():
            if isinstance(error, BadRequest):
                output.failed[int(rows[i])] = error.message
                output.refused.add(int(rows[i]))
            else:
                output.failed[int(rows[i])] = f"{type(error).__name__}: {error}"
        for i, slot in enumerate(slots):
            if slot.params.processors and int(rows[i]) not in output.failed:
                try:
                    slot.process_(logits_LV[i])
                except Exception as error:
                    if is_out_of_memory(error):
                        raise
                    _log.warning("request %s: a logit processor failed: %s", slot.request_id, error)
                    output.failed[int(rows[i])] = f"{type(error).__name__}: {error}"

    def _prompt_logprobs(self, batch: Batch, hidden_LN: Tensor, output: StepOutput) -> None:
        start = 0
        for row in prompt_rows(batch):
            targets = batch.prompt_targets[row]
            wanted = torch.from_numpy(targets[targets >= 0]).to(hidden_LN.device)
            slot = self._slots[int(batch.slots[row])]
            found: list[PositionLogprobs] = []
            for piece in range(0, len(wanted), HEAD_ROWS):
                tokens_L = wanted[piece : piece + HEAD_ROWS]
                logits_LV = self.model.head(hidden_LN[start + piece : start + piece + len(tokens_L)])
                found += position_logprobs(logits_LV, tokens_L, slot.top_logprobs, slot.token_ids_logprob, self._ops)
            output.prompt_logprobs[row] = found
            start += len(wanted)


def _adjust_row_(slot: Slot, generated: int, logits_V: Tensor) -> None:
    """`generated`: how many tokens this request has produced so far."""
    if slot.penalties is not None:
        slot.penalties.apply_(logits_V)
    if slot.bias is not None:
        logits_V.index_add_(0, *slot.bias)
    if generated < slot.params.min_new_tokens and slot.eos_ids:
        logits_V[list(slot.eos_ids)] = float("-inf")


def _give_out(rows: Index, slots: list[Slot], coming: Coming, output: StepOutput) -> None:
    """Tokens into the output. A row that is not sound fails alone: its weights or its cache are damaged."""
    values, damaged = coming.wait()
    for i in np.flatnonzero(damaged):
        output.failed.setdefault(int(rows[i]), "the model's logits are not numbers (NaN)")
    output.tokens[rows] = values
    for row in output.failed:
        output.tokens[row] = -1
    for i, slot in enumerate(slots):
        if slot.mask is not None and int(rows[i]) not in output.failed:
            slot.since_mask.append(int(values[i]))
        if slot.params.processors:
            slot.output.append(int(values[i]))
