"""A runner without a model: the next token is a hash of the tokens that it really reads through its page table.

It keeps a page store of token ids as an engine keeps KV. A wrong page, a stale page, a wrong position or a wrong slot
gives another token than `oracle`, which never sees a page.
"""

from __future__ import annotations

import time
import zlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from phloem.core.batch import FROM_DEVICE, Admission, Batch, PositionLogprobs, StepOutput
from phloem.core.errors import BadRequest, OutOfMemory

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

GARBAGE = -7  # what a page holds that nobody has written
FIRST_TOKEN = 8  # ids below are never drawn, so tests may use them as end-of-sequence and stop ids


def next_token(tokens: NDArray[np.int32], seed: int, vocab_size: int) -> int:
    """The token after `tokens`."""
    digest = zlib.crc32(np.ascontiguousarray(tokens, dtype=np.int32).tobytes(), seed & 0xFFFFFFFF)
    return FIRST_TOKEN + digest % (vocab_size - FIRST_TOKEN)


def logprob(token: int, position: int) -> float:
    """The log probability that the fake model gives to `token` at `position`; any token, any position."""
    return -((token * 31 + position * 17) % 1009) / 64.0


def oracle(
    prompt: list[int], seed: int, count: int, vocab_size: int, forced: dict[int, int] | None = None
) -> list[int]:
    """The first `count` output tokens, computed in one straight line. `forced`: see `FakeRunner.force`."""
    tokens = list(prompt)
    for _ in range(count):
        drawn = next_token(np.array(tokens, dtype=np.int32), seed, vocab_size)
        tokens.append((forced or {}).get(len(tokens), drawn))
    return tokens[len(prompt) :]


class FakePending:
    """A step that has run already, but tells so only when its time has come."""

    def __init__(self, output: StepOutput | Exception, ready_at: float, verify: Callable[[], None]) -> None:
        self._output = output
        self._ready_at = ready_at
        self._verify = verify

    def done(self) -> bool:
        return time.monotonic() >= self._ready_at

    def result(self) -> StepOutput:
        wait = self._ready_at - time.monotonic()
        if wait > 0:
            time.sleep(wait)
        self._verify()
        if isinstance(self._output, Exception):
            raise self._output
        return self._output


@dataclass(slots=True)
class _Slot:
    admission: Admission
    last: int = FROM_DEVICE
    unfed: list[int] = field(default_factory=list)


class FakeRunner:
    """Implements `core.batch.Runner`.

    force: request id -> {position: token sampled there}, for end-of-sequence where a test wants it.
    fail_row(request_id, position): a message fails that row alone. `fail_steps`: step numbers whose `result` raises;
    `fail_launches`: step numbers whose `launch` raises. `delay`: seconds that a step takes.
    starve(batch): whether there is no memory for that step. It runs all the same and then loses what it wrote.
    """

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        max_slots: int,
        vocab_size: int = 1000,
        delay: float = 0.0,
        force: dict[str, dict[int, int]] | None = None,
        fail_row: Callable[[str, int], str | None] | None = None,
        starve: Callable[[Batch], bool] | None = None,
    ) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self.max_slots = max_slots
        self.vocab_size = vocab_size
        self.delay = delay
        self.force = force or {}
        self.fail_row = fail_row
        self.starve = starve
        self.starved = 0  # steps
        self.fail_steps: set[int] = set()
        self.fail_launches: set[int] = set()
        self.store = np.full((num_pages, page_size), GARBAGE, dtype=np.int32)
        self.computed: dict[str, int] = {}  # request id -> new tokens computed for it
        self.steps = 0
        self.max_tokens = 0  # largest step so far
        self.closed = False
        self._slots: dict[int, _Slot] = {}
        self._busy_until = 0.0
        self._closed_epoch = -1

    @property
    def computed_tokens(self) -> int:
        return sum(self.computed.values())

    def launch(self, batch: Batch) -> FakePending:
        if batch.step in self.fail_launches:
            raise RuntimeError(f"injected: launch of step {batch.step}")
        self._check_shape(batch)
        if batch.epoch <= self._closed_epoch:
            return FakePending(OutOfMemory("behind a step that failed"), 0.0, _unchanged(batch))
        for admission in batch.admissions:
            self._slots[admission.slot] = _Slot(admission)
        self.steps += 1
        self.max_tokens = max(self.max_tokens, batch.num_tokens)
        output: StepOutput | Exception = self._run(batch)
        if self.starve is not None and self.starve(batch):
            output = self._out_of_memory(batch)
        if batch.step in self.fail_steps:
            output = RuntimeError(f"injected: step {batch.step}")
        self._busy_until = max(self._busy_until, time.monotonic()) + self.delay
        return FakePending(output, self._busy_until, _unchanged(batch))

    def close(self) -> None:
        self.closed = True

    def _check_shape(self, batch: Batch) -> None:
        rows = batch.num_rows
        arrays = (batch.query_lens, batch.prefix_lens, batch.page_table, batch.sample)
        assert rows and all(len(array) == rows for array in arrays)
        assert len(set(batch.slots.tolist())) == rows, "a slot twice in one batch"
        assert (batch.slots >= 0).all() and (batch.slots < self.max_slots).all()
        assert (batch.query_lens >= 1).all() and int(batch.query_lens.sum()) == batch.num_tokens
        for name in ("slots", "query_lens", "prefix_lens", "input_ids", "page_table"):
            assert getattr(batch, name).dtype == np.int32, name

    def _run(self, batch: Batch) -> StepOutput:
        output = StepOutput(batch.step, np.full(batch.num_rows, -1, dtype=np.int32), forward_seconds=self.delay)
        starts = np.cumsum(batch.query_lens) - batch.query_lens
        # All rows write before any reads, as attention layers do.
        for row, slot in enumerate(batch.slots.tolist()):
            ids = batch.input_ids[starts[row] : starts[row] + batch.query_lens[row]].copy()
            ids[ids == FROM_DEVICE] = self._slots[slot].last
            self._write(batch, row, ids)
        for row, slot in enumerate(batch.slots.tolist()):
            self._row(batch, row, self._slots[slot], output)
        return output

    def _write(self, batch: Batch, row: int, ids: NDArray[np.int32]) -> None:
        start, count = int(batch.prefix_lens[row]), int(batch.query_lens[row])
        positions = np.arange(start, start + count)
        pages = batch.page_table[row, positions // self.page_size]
        assert (pages >= 1).all() and (pages < self.num_pages).all(), f"row {row} has no page for a new token"
        self.store[pages, positions % self.page_size] = ids

    def _out_of_memory(self, batch: Batch) -> OutOfMemory:
        for row in range(batch.num_rows):
            self._write(batch, row, np.full(batch.query_lens[row], GARBAGE, np.int32))
        self._slots.clear()
        self._closed_epoch = batch.epoch
        self.starved += 1
        return OutOfMemory(f"injected: step {batch.step} of {batch.num_tokens} tokens")

    def _row(self, batch: Batch, row: int, state: _Slot, output: StepOutput) -> None:
        admission = state.admission
        count = int(batch.query_lens[row])
        end = int(batch.prefix_lens[row]) + count
        positions = np.arange(end)
        seen = self.store[batch.page_table[row, positions // self.page_size], positions % self.page_size]
        name = admission.request_id
        self.computed[name] = self.computed.get(name, 0) + count
        reason = self.fail_row(name, end) if self.fail_row is not None else None
        if reason is not None:
            output.failed[row] = reason
            return
        if row in batch.prompt_targets:
            targets = batch.prompt_targets[row].tolist()
            assert len(targets) == count
            output.prompt_logprobs[row] = [
                self._logprobs(token, end - count + offset + 1, admission)
                for offset, token in enumerate(targets)
                if token >= 0
            ]
        if batch.sample[row]:
            try:
                token = self._sample(seen, end, state)
            except BadRequest as error:
                output.failed[row] = error.message
                output.refused.add(row)
                return
            except Exception as error:
                output.failed[row] = f"{type(error).__name__}: {error}"
                return
            output.tokens[row] = state.last = token
            state.unfed.append(token)
            if admission.return_hidden:
                output.hidden[row] = np.array([token, end], np.float32)
            if admission.return_logprob:
                output.logprobs[row] = self._logprobs(token, end, admission)

    def _sample(self, seen: NDArray[np.int32], position: int, state: _Slot) -> int:
        admission = state.admission
        token = next_token(seen, admission.seed, self.vocab_size)
        token = self.force.get(admission.request_id, {}).get(position, token)
        if admission.mask is None:
            return token
        words = admission.mask(state.unfed)
        state.unfed = []
        if words is None:
            return token
        bits = np.unpackbits(words.view(np.uint8), bitorder="little")[: self.vocab_size]
        allowed = np.flatnonzero(bits)
        if not len(allowed):
            raise ValueError("the mask allows no token")
        return token if bits[token] else int(allowed[token % len(allowed)])

    def _logprobs(self, token: int, position: int, admission: Admission) -> PositionLogprobs:
        top = [(logprob(other, position), other) for other in range(admission.top_logprobs)]
        chosen = [(logprob(other, position), other) for other in admission.token_ids_logprob]
        return PositionLogprobs(logprob(token, position), sorted(top, reverse=True), chosen)


def _unchanged(batch: Batch) -> Callable[[], None]:
    """A check that nobody has changed the batch's arrays since its launch."""
    arrays = (batch.slots, batch.query_lens, batch.prefix_lens, batch.input_ids, batch.page_table, batch.sample)
    before = [array.tobytes() for array in arrays]

    def verify() -> None:
        assert before == [array.tobytes() for array in arrays], f"the batch of step {batch.step} was changed"

    return verify
