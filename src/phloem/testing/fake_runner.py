"""A runner without a model: the next token is a hash of the tokens that it really reads through its tables.

It keeps a store of token ids as an engine keeps KV: every group of memory has its own, a window reads the last tokens
alone, a state takes them in one after the other. A wrong page, a stale page, a wrong state, a wrong position or a wrong
slot gives another token than `oracle`, which never sees a page.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np

from phloem.core.batch import FROM_DEVICE, Admission, Batch, PositionLogprobs, StepOutput
from phloem.core.errors import BadRequest, OutOfMemory
from phloem.core.memory import MemorySpec, Paged, groups_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from phloem.core.batch import Follower
    from phloem.core.memory import Group

T = TypeVar("T")
GARBAGE = -7  # what a page holds that nobody has written
FIRST_TOKEN = 8  # ids below are never drawn, so tests may use them as end-of-sequence and stop ids
FULL: tuple[MemorySpec, ...] = (Paged(1, 1, 1),)


def next_token(tokens: NDArray[np.int32], seed: int, vocab_size: int) -> int:
    """The token after `tokens`."""
    return draw([tokens], seed, vocab_size)


def draw(seen: Sequence[NDArray[np.int32]], seed: int, vocab_size: int) -> int:
    """The token after what each group has `seen`."""
    digest = seed & 0xFFFFFFFF
    for tokens in seen:
        digest = zlib.crc32(np.ascontiguousarray(tokens, dtype=np.int32).tobytes(), digest)
    return FIRST_TOKEN + digest % (vocab_size - FIRST_TOKEN)


def take_in(state: int, tokens: NDArray[np.int32]) -> int:
    """The state after these tokens; it begins as 0."""
    return zlib.crc32(np.ascontiguousarray(tokens, dtype=np.int32).tobytes(), state)


def sight(groups: Sequence[Group], tokens: NDArray[np.int32]) -> list[NDArray[np.int32]]:
    """What each group should have seen of `tokens`."""
    return [
        tokens[-group.window :]
        if group.kind == "pages"
        else np.array([take_in(0, tokens)], dtype=np.uint32).view(np.int32)
        for group in groups
    ]


def logprob(token: int, position: int) -> float:
    """The log probability that the fake model gives to `token` at `position`; any token, any position."""
    return -((token * 31 + position * 17) % 1009) / 64.0


def oracle(
    prompt: list[int],
    seed: int,
    count: int,
    vocab_size: int,
    forced: dict[int, int] | None = None,
    memory: Sequence[MemorySpec] = FULL,
) -> list[int]:
    """The first `count` output tokens, computed in one straight line. `forced`: see `FakeRunner.force`."""
    tokens, groups = list(prompt), groups_of(memory)
    for _ in range(count):
        drawn = draw(sight(groups, np.array(tokens, dtype=np.int32)), seed, vocab_size)
        tokens.append((forced or {}).get(len(tokens), drawn))
    return tokens[len(prompt) :]


class FakePending(Generic[T]):
    """Work that is done already, but tells so only when its time has come."""

    def __init__(self, output: T | Exception, ready_at: float, verify: Callable[[], None], runner: FakeRunner) -> None:
        self._output = output
        self._ready_at = ready_at
        self._verify = verify
        self._runner = runner

    def done(self) -> bool:
        return self._runner.clock() >= self._ready_at

    def result(self) -> T:
        wait = self._ready_at - self._runner.clock()
        if wait > 0:
            self._runner.sleep(wait)
        self._verify()
        if isinstance(self._output, Exception):
            raise self._output
        return self._output


@dataclass(slots=True)
class _Slot:
    admission: Admission
    follower: Follower | None
    last: int = FROM_DEVICE
    unfed: list[int] = field(default_factory=list)


@dataclass(slots=True)
class _Row:
    """A row while it runs: `ids` are its new tokens, drafts included; `states` what each state group had before."""

    slot: _Slot
    prefix: int
    ids: list[int]
    drafts: list[int]
    states: dict[int, int] = field(default_factory=dict[int, int])


class FakeRunner:
    """Implements `core.batch.Runner`, and speculates where a batch gives room.

    memory: what the model keeps (`core.memory`). num_pages: of each of its groups, or of all alike.
    force: request id -> {position: token sampled there}, for end-of-sequence where a test wants it.
    drafter(request_id, position, room): the drafts for the tokens at `position` and behind; none without one.
    `draft_room`: what it asks the scheduler to leave room for.
    fail_row(request_id, position): a message fails that row alone. `fail_steps`: step numbers whose `result` raises;
    `fail_launches`: step numbers whose `launch` raises. `delay`: seconds that a step takes.
    starve(batch): whether there is no memory for that step. It runs all the same and then loses what it wrote.
    `weights`: added to every seed; `between` may change it, as an update of weights would.
    """

    graph_bytes = 0

    def __init__(
        self,
        num_pages: int | Sequence[int],
        page_size: int,
        max_slots: int,
        vocab_size: int = 1000,
        delay: float = 0.0,
        force: dict[str, dict[int, int]] | None = None,
        fail_row: Callable[[str, int], str | None] | None = None,
        starve: Callable[[Batch], bool] | None = None,
        memory: Sequence[MemorySpec] = FULL,
        drafter: Callable[[str, int, int], list[int]] | None = None,
        draft_room: int = 0,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.groups = groups_of(memory)
        self.num_pages = (num_pages,) * len(self.groups) if isinstance(num_pages, int) else tuple(num_pages)
        self.page_size = page_size
        self.max_slots = max_slots
        self.vocab_size = vocab_size
        self.delay = delay
        self.force = force or {}
        self.fail_row = fail_row
        self.starve = starve
        self.drafter, self.draft_room = drafter, draft_room
        self.clock = clock
        self.sleep = sleep
        self.weights = 0
        self.starved = 0  # steps
        self.drafted = self.accepted = 0
        self.fail_steps: set[int] = set()
        self.fail_launches: set[int] = set()
        # Of each group: the tokens in its pages, or what each slot of state has taken in, and of how many tokens.
        self.stores = [
            np.full((pages, page_size if group.kind == "pages" else 2), GARBAGE, np.int64)
            for group, pages in zip(self.groups, self.num_pages, strict=True)
        ]
        self.computed: dict[str, int] = {}  # request id -> new tokens computed for it, drafts left out
        self.steps = 0
        self.max_tokens = 0  # largest step so far
        self.closed = False
        self._slots: dict[int, _Slot] = {}
        self._followers: dict[int, Follower | None] = {}
        self._busy_until = 0.0
        self._closed_epoch = -1

    @property
    def prepared(self) -> dict[str, Any]:
        return {}

    @property
    def computed_tokens(self) -> int:
        return sum(self.computed.values())

    def launch(self, batch: Batch) -> FakePending[StepOutput]:
        if batch.step in self.fail_launches:
            raise RuntimeError(f"injected: launch of step {batch.step}")
        self._check_shape(batch)
        if batch.epoch <= self._closed_epoch:
            return FakePending(OutOfMemory("behind a step that failed"), 0.0, _unchanged(batch), self)
        for admission in batch.admissions:
            follower = self._followers.pop(admission.slot, None)
            assert (follower is not None) == admission.constrained, "constrained, but nobody follows it, or the reverse"
            self._slots[admission.slot] = _Slot(admission, follower)
        self.steps += 1
        room = 0 if batch.drafts is None else int(batch.drafts.sum())
        self.max_tokens = max(self.max_tokens, batch.num_tokens + room)
        output: StepOutput | Exception = self._run(batch)
        if self.starve is not None and self.starve(batch):
            output = self._out_of_memory(batch)
        if batch.step in self.fail_steps:
            output = RuntimeError(f"injected: step {batch.step}")
        self._busy_until = max(self._busy_until, self.clock()) + self.delay
        return FakePending(output, self._busy_until, _unchanged(batch), self)

    def constrain(self, slot: int, follower: Follower | None) -> None:
        self._followers[slot] = follower

    def between(self, work: Callable[[], T]) -> FakePending[T]:
        try:
            result: T | Exception = work()
        except Exception as error:
            result = error
        return FakePending(result, self._busy_until, lambda: None, self)

    def read_weight(self, name: str, rows: int) -> NDArray[np.float32]:
        """Its only one, `weights`."""
        if name != "weights":
            raise BadRequest(f"no weight is called {name!r}", param="name")
        return np.full((1, 1), self.weights, np.float32)[:rows]

    def close(self) -> None:
        self.closed = True

    def _check_shape(self, batch: Batch) -> None:
        rows = batch.num_rows
        arrays = (batch.query_lens, batch.prefix_lens, batch.outputs, *batch.tables)
        assert rows and all(len(array) == rows for array in arrays)
        assert len(batch.tables) == len(self.groups)
        assert len(set(batch.slots.tolist())) == rows, "a slot twice in one batch"
        assert (batch.slots >= 0).all() and (batch.slots < self.max_slots).all()
        assert (batch.query_lens >= 1).all() and int(batch.query_lens.sum()) == batch.num_tokens
        assert set(batch.outputs.tolist()) <= {0, 1}, "whoever speculates puts the drafts behind the tokens"
        assert batch.drafts is None or (batch.outputs[batch.drafts > 0] == 1).all()
        for array in (batch.slots, batch.input_ids, *arrays):
            assert array.dtype == np.int32

    def _run(self, batch: Batch) -> StepOutput:
        rows = [self._row(batch, row) for row in range(batch.num_rows)]
        # All rows write before any reads, as attention layers do.
        for row, work in enumerate(rows):
            self._write(batch, row, work)
        none = np.empty(0, np.int32)
        output = StepOutput(batch.step, np.zeros(batch.num_rows, np.int32), none, forward_seconds=self.delay)
        tokens: list[int] = []
        for row, work in enumerate(rows):
            given = self._choose(batch, row, work, output)
            output.counts[row] = len(given)
            tokens += given
        output.tokens = np.array(tokens, dtype=np.int32)
        return output

    def _row(self, batch: Batch, row: int) -> _Row:
        start = int(batch.query_lens[:row].sum())
        slot = self._slots[int(batch.slots[row])]
        ids = batch.input_ids[start : start + int(batch.query_lens[row])].copy()
        ids[ids == FROM_DEVICE] = slot.last
        prefix, drafts = int(batch.prefix_lens[row]), list[int]()
        if batch.drafts is not None and batch.drafts[row] and self.drafter is not None:
            room = int(batch.drafts[row])
            drafts = self.drafter(slot.admission.request_id, prefix + len(ids), room)[:room]
        return _Row(slot, prefix, [*ids.tolist(), *drafts], drafts)

    def _write(self, batch: Batch, row: int, work: _Row) -> None:
        """Pages at once; states once it is known how many drafts count."""
        positions = np.arange(work.prefix, work.prefix + len(work.ids))
        for index, (group, table) in enumerate(zip(self.groups, batch.tables, strict=True)):
            if group.kind == "state":
                read, write = table[row].tolist()
                assert write >= 1 and (read != write or not work.prefix), f"row {row} writes the state that it reads"
                state, count = self.stores[index][read].tolist() if work.prefix else (0, 0)
                work.states[index] = state if count == work.prefix else GARBAGE
                continue
            needed = np.arange(group.first_needed(work.prefix), work.prefix + len(work.ids))
            pages = table[row, needed // self.page_size]
            assert (pages >= 1).all() and (pages < self.num_pages[index]).all(), f"row {row} lacks a page that it needs"
            self.stores[index][table[row, positions // self.page_size], positions % self.page_size] = work.ids

    def _out_of_memory(self, batch: Batch) -> OutOfMemory:
        for row in range(batch.num_rows):
            count = int(batch.query_lens[row])
            work = _Row(self._slots[int(batch.slots[row])], int(batch.prefix_lens[row]), [GARBAGE] * count, [])
            self._write(batch, row, work)
            self._keep_states(batch, row, work, GARBAGE)
        self._slots.clear()
        self._followers.clear()
        self._closed_epoch = batch.epoch
        self.starved += 1
        return OutOfMemory(f"injected: step {batch.step} of {batch.num_tokens} tokens")

    def _keep_states(self, batch: Batch, row: int, work: _Row, count: int) -> None:
        """The row's first `count` new tokens are in its states."""
        for index, state in work.states.items():
            after = take_in(state & 0xFFFFFFFF, np.array(work.ids[:count], np.int32)) if count >= 0 else GARBAGE
            self.stores[index][batch.tables[index][row, 1]] = after, work.prefix + count

    def _seen(self, batch: Batch, row: int, work: _Row, end: int) -> list[NDArray[np.int32]]:
        """What each group has of the row's tokens before position `end`."""
        seen: list[NDArray[np.int32]] = []
        for index, (group, table) in enumerate(zip(self.groups, batch.tables, strict=True)):
            if group.kind == "state":
                state = take_in(work.states[index] & 0xFFFFFFFF, np.array(work.ids[: end - work.prefix], np.int32))
                seen.append(np.array([state], dtype=np.uint32).view(np.int32))
                continue
            positions = np.arange(max(0, end - group.window) if group.window else 0, end)
            pages = table[row, positions // self.page_size]
            seen.append(self.stores[index][pages, positions % self.page_size].astype(np.int32))
        return seen

    def _choose(self, batch: Batch, row: int, work: _Row, output: StepOutput) -> list[int]:
        """The row's tokens; its logprobs, hidden states and failures go into `output`."""
        admission, own = work.slot.admission, len(work.ids) - len(work.drafts)
        name, end = admission.request_id, work.prefix + own
        self.computed[name] = self.computed.get(name, 0) + own
        self._keep_states(batch, row, work, own)
        reason = self.fail_row(name, end) if self.fail_row is not None else None
        if reason is not None:
            output.failed[row] = reason
            return []
        if row in batch.prompt_targets:
            targets = batch.prompt_targets[row].tolist()
            assert len(targets) == own
            output.prompt_logprobs[row] = [
                self._logprobs(token, end - own + offset + 1, admission)
                for offset, token in enumerate(targets)
                if token >= 0
            ]
        if not batch.outputs[row]:
            return []
        try:
            tokens = self._sample(batch, row, work, end)
        except BadRequest as error:
            output.failed[row] = error.message
            output.refused.add(row)
            return []
        except Exception as error:
            output.failed[row] = f"{type(error).__name__}: {error}"
            return []
        self._keep_states(batch, row, work, own + len(tokens) - 1)
        output.drafted += len(work.drafts)
        self.drafted, self.accepted = self.drafted + len(work.drafts), self.accepted + len(tokens) - 1
        work.slot.last = tokens[-1]
        work.slot.unfed += tokens
        if admission.return_hidden:
            output.hidden[row] = np.array([[token, end + i] for i, token in enumerate(tokens)], np.float32)
        if admission.return_logprob:
            output.logprobs[row] = [self._logprobs(token, end + i, admission) for i, token in enumerate(tokens)]
        return tokens

    def _sample(self, batch: Batch, row: int, work: _Row, end: int) -> list[int]:
        """Draw at each position; a draft counts while it is what is drawn."""
        slot, masks, tokens = work.slot, None, list[int]()
        if slot.follower is not None:
            masks = slot.follower.masks(slot.unfed, work.drafts)
            slot.unfed = []
            assert 1 <= len(masks) <= 1 + len(work.drafts)
        for place in range(1 + len(work.drafts)):
            if masks is not None and place == len(masks):
                break
            seen = self._seen(batch, row, work, end + place)
            token = draw(seen, slot.admission.seed + self.weights, self.vocab_size)
            token = self.force.get(slot.admission.request_id, {}).get(end + place, token)
            tokens.append(_allowed(token, None if masks is None else masks[place], self.vocab_size))
            if place == len(work.drafts) or tokens[-1] != work.drafts[place]:
                break
        return tokens

    def _logprobs(self, token: int, position: int, admission: Admission) -> PositionLogprobs:
        top = [(logprob(other, position), other) for other in range(admission.top_logprobs)]
        chosen = [(logprob(other, position), other) for other in admission.token_ids_logprob]
        return PositionLogprobs(logprob(token, position), sorted(top, reverse=True), chosen)


def _allowed(token: int, words: NDArray[np.int32] | None, vocab_size: int) -> int:
    """The token, or another where the mask forbids it."""
    if words is None:
        return token
    bits = np.unpackbits(words.view(np.uint8), bitorder="little")[:vocab_size]
    allowed = np.flatnonzero(bits)
    if not len(allowed):
        raise ValueError("the mask allows no token")
    return token if bits[token] else int(allowed[token % len(allowed)])


def _unchanged(batch: Batch) -> Callable[[], None]:
    """A check that nobody has changed the batch's arrays since its launch."""
    arrays = [batch.slots, batch.query_lens, batch.prefix_lens, batch.input_ids, batch.outputs, *batch.tables]
    arrays += [] if batch.drafts is None else [batch.drafts]
    before = [array.tobytes() for array in arrays]

    def verify() -> None:
        assert before == [array.tobytes() for array in arrays], f"the batch of step {batch.step} was changed"

    return verify
