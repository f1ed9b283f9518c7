"""Drives the engine's runner with batches of its own, row by row, without a scheduler."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from phloem.attention import BACKENDS
from phloem.core.batch import Admission, Batch, Follower, PositionLogprobs, StepOutput
from phloem.core.errors import OutOfMemory
from phloem.core.memory import groups_of
from phloem.core.request import SamplingParams
from phloem.engine import forward as forward_file
from phloem.engine import runner as runner_file
from phloem.engine.runner import ModelRunner
from phloem.engine.sampling import choose as choose_file
from phloem.engine.sampling.masks import Masks
from phloem.engine.sampling.penalties import Penalties
from phloem.engine.transfer import plain_into
from phloem.kernels.ops import Ops
from phloem.kvcache.pool import KVPool
from phloem.layers.context import memory_of
from phloem.platforms._streams import Arriving
from phloem.platforms.cpu import Platform

CPU = torch.device("cpu")
HOST = Platform.facts
PAGE = 8
ROW_PAGES = 16  # pages that each row has


def pool_of(model: Any, rows: int, page: int = PAGE, dtype: torch.dtype = torch.float32) -> KVPool:
    memory = memory_of(model.attention_specs)
    return KVPool(memory, [rows * ROW_PAGES + 1] * len(groups_of(memory)), page, dtype, CPU)


def runner_of(model: Any, rows: int, ops: Ops | None = None, backend: str = "reference", **options: Any) -> ModelRunner:
    ops = ops or Ops()
    pool = options.pop("pool", None) or pool_of(model, rows)
    made = BACKENDS.module(backend).Backend(ops, model.attention_specs, CPU, pool.dtype)
    options.setdefault("facts", HOST)
    return ModelRunner(model, made, pool, ops, rows, **options)


def bits(*tokens: int, words: int) -> np.ndarray[Any, np.dtype[np.int32]]:
    """A mask that allows these tokens."""
    mask = np.zeros(words, np.uint32)
    for token in tokens:
        mask[token // 32] |= np.uint32(1 << token % 32)
    return mask.view(np.int32)


@dataclass
class Row:
    """One request and what it has been given."""

    prompt: list[int]
    params: SamplingParams
    options: dict[str, Any] = field(default_factory=dict)  # of its admission
    follow: Callable[[], Follower] | None = None
    tokens: list[int] = field(default_factory=list)
    logprobs: list[PositionLogprobs] = field(default_factory=list)
    hidden: list[Any] = field(default_factory=list)
    computed: int = 0

    @property
    def known(self) -> list[int]:
        return [*self.prompt, *self.tokens]


Drafter = Callable[[int, Row], Sequence[int]]


class Stepper:
    """All rows in one batch a step: whatever of a row is not computed, and behind it what `drafter` says."""

    def __init__(self, runner: ModelRunner, rows: list[Row]) -> None:
        self.runner, self.rows = runner, rows
        self.steps, self.epoch, self.starved = 0, 0, 0
        self.outputs: list[StepOutput] = []
        self._fresh = True

    def run(self, length: int, drafter: Drafter = lambda place, row: ()) -> list[list[int]]:
        """Until every row has so many tokens; what comes beyond is cut."""
        while any(len(row.tokens) < length for row in self.rows):
            self.step(drafter)
            assert self.steps < 500
        return [row.tokens[:length] for row in self.rows]

    def step(self, drafter: Drafter = lambda place, row: ()) -> None:
        drafts = [list(drafter(place, row)) if row.computed else [] for place, row in enumerate(self.rows)]
        batch = self._batch(drafts)
        self.steps += 1
        try:
            output = self.runner.launch(batch).result()
        except OutOfMemory:
            self._start_over()
            return
        self._fresh = False
        self._take(output, batch, drafts)

    def _start_over(self) -> None:
        self.epoch, self.starved, self._fresh = self.epoch + 1, self.starved + 1, True

    def _batch(self, drafts: list[list[int]]) -> Batch:
        new = [[*row.known[row.computed :], *more] for row, more in zip(self.rows, drafts, strict=True)]
        slots = np.arange(len(self.rows), dtype=np.int32)
        table = (np.arange(len(self.rows) * ROW_PAGES) + 1).reshape(-1, ROW_PAGES).astype(np.int32)
        return Batch(
            step=self.steps,
            slots=slots,
            query_lens=np.array([len(ids) for ids in new], np.int32),
            prefix_lens=np.array([row.computed for row in self.rows], np.int32),
            input_ids=np.array([token for ids in new for token in ids], np.int32),
            tables=self._tables(table),
            outputs=np.array([1 + len(more) for more in drafts], np.int32),
            admissions=[self._admission(place) for place in range(len(self.rows))] if self._fresh else [],
            epoch=self.epoch,
        )

    def _tables(self, table: Any) -> Any:
        """Another page for the same positions in every group."""
        return tuple(np.roll(table, place, 0) for place in range(len(self.runner.groups)))

    def _admission(self, place: int) -> Admission:
        row = self.rows[place]
        if row.follow is not None:
            self.runner.constrain(place, row.follow())
        known = np.array(row.known, np.int32)
        return Admission(
            place, f"r{place}", row.params, 7 + place, known, len(row.prompt),
            constrained=row.follow is not None, **row.options,
        )  # fmt: skip

    def _take(self, output: StepOutput, batch: Batch, drafts: list[list[int]]) -> None:
        assert not output.failed, output.failed
        assert output.counts.sum() == len(output.tokens)
        self.outputs.append(output)
        start = 0
        for place, row in enumerate(self.rows):
            count = int(output.counts[place])
            tokens = output.tokens[start : start + count].tolist()
            start += count
            assert 1 <= count <= 1 + len(drafts[place]) and tokens[:-1] == drafts[place][: count - 1]
            row.computed = len(row.known) + count - 1
            row.tokens += tokens
            logprobs, hidden = output.logprobs.get(place, []), output.hidden.get(place, [])
            assert len(logprobs) in (0, count) and len(hidden) in (0, count)
            row.logprobs += logprobs
            row.hidden += list(hidden)


class LateCopies:
    """Streams whose copies have not ended the first times that somebody asks: a next step, if there is one, begins
    before."""

    def up(self, arrays: Any) -> list[torch.Tensor]:
        return [torch.from_numpy(np.array(array)) for array in arrays]

    def into(self, target: torch.Tensor, parts: Any) -> None:
        plain_into(target, parts)

    def down(self, tensors: Any) -> Arriving:
        asked: list[int] = []

        class Event:
            def query(self) -> bool:
                asked.append(1)
                return len(asked) > 3

            def synchronize(self) -> None: ...

        return Arriving([tensor.clone() for tensor in tensors], Event())


# Where a step may find no memory: the owner of a function, and the function's name.
PLACES = {
    "forward": (forward_file, "run_forward"),
    "sampling": (choose_file, "sample"),
    "logprobs": (choose_file, "logprob_tensors"),
    "mask": (Masks, "_fill"),
    "masking": (Masks, "apply_"),
    "penalties": (Penalties, "apply_"),
    "admission": (Penalties, "__init__"),
    "landing": (runner_file, "give_out"),
}


class Bomb:
    """Finds no memory on these calls of what it wraps."""

    def __init__(self, calls: set[int], error: Callable[[], BaseException]) -> None:
        self.calls, self.error, self.count, self.thrown = calls, error, 0, 0

    def __call__(self, function: Any) -> Any:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            if self.count in self.calls:
                self.thrown += 1
                raise self.error()
            return function(*args, **kwargs)

        return wrapped
