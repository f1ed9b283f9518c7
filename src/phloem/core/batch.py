"""The contract between scheduler and engine: one step's work, and what comes back.

Legend: R rows (requests in the step), T packed new tokens of all rows, P pages per row.
A *slot* is the small integer that a running request keeps from admission to release; the engine holds a request's
sampling state and its last sampled token by slot, so that a step may be launched before the host knows that token.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from phloem.core.request import SamplingParams

FROM_DEVICE = -1  # in `Batch.input_ids`: take the slot's last sampled token, which only the device knows yet


@dataclass(slots=True)
class Admission:
    """A request that enters a slot (for the first time, or again after a preemption)."""

    slot: int
    request_id: str
    params: SamplingParams
    seed: int  # decides every random draw of this request, together with the position
    tokens: NDArray[np.int32]  # every known token: prompt, then output so far
    num_prompt: int
    eos_ids: tuple[int, ...] = ()  # tokens that `min_new_tokens` forbids
    return_logprob: bool = False
    top_logprobs: int = 0
    token_ids_logprob: tuple[int, ...] = ()
    return_hidden: bool = False
    # Called in the runner's thread between forward and sample: (tokens sampled since the last call) -> allowed tokens
    # as a bit mask, 32 tokens a word, or None for no restriction. Raising fails this request alone.
    mask: Callable[[list[int]], NDArray[np.int32] | None] | None = None


@dataclass(slots=True)
class Batch:
    """One step. Arrays are owned by the batch: nothing changes them after `launch`."""

    step: int
    slots: NDArray[np.int32]  # [R]
    query_lens: NDArray[np.int32]  # [R] new tokens of each row, at least 1
    prefix_lens: NDArray[np.int32]  # [R] tokens whose KV is already in the row's pages
    input_ids: NDArray[np.int32]  # [T] token ids or FROM_DEVICE
    page_table: NDArray[np.int32]  # [R, P] page ids; page j holds positions [j * page_size, (j + 1) * page_size)
    sample: NDArray[np.bool_]  # [R] whether a token is sampled after the row's last new token
    admissions: list[Admission] = field(default_factory=list)
    # Row -> prompt token at each new position + 1 (or -1: not wanted), for prompt logprobs. int32 [query_len of row]
    prompt_targets: dict[int, NDArray[np.int32]] = field(default_factory=dict)
    # Raised by the scheduler when a step failed for lack of memory: no batch of an older epoch counts any more.
    epoch: int = 0

    @property
    def num_rows(self) -> int:
        return len(self.slots)

    @property
    def num_tokens(self) -> int:
        return len(self.input_ids)

    @property
    def is_decode(self) -> bool:
        """True when every row has exactly one new token and samples: the step a graph can serve."""
        return self.num_tokens == self.num_rows and bool(self.sample.all())


@dataclass(slots=True)
class PositionLogprobs:
    """Log probabilities at one position, in nats of the distribution before temperature and penalties."""

    token: float
    top: list[tuple[float, int]] = field(default_factory=list)  # (logprob, token id), best first
    chosen: list[tuple[float, int]] = field(default_factory=list)  # for `token_ids_logprob`


@dataclass(slots=True)
class StepOutput:
    """What a step gave. `tokens[r]` is -1 where row r did not sample or failed."""

    step: int
    tokens: NDArray[np.int32]  # [R]
    logprobs: dict[int, PositionLogprobs] = field(default_factory=dict)  # row -> of its sampled token
    prompt_logprobs: dict[int, list[PositionLogprobs]] = field(
        default_factory=dict
    )  # row -> wanted positions, in order
    hidden: dict[int, NDArray[np.float32]] = field(default_factory=dict)  # row -> [hidden] its token was chosen from
    failed: dict[int, str] = field(default_factory=dict)  # row -> why this row alone failed
    refused: set[int] = field(default_factory=set)  # of these, the rows whose own request is at fault
    forward_seconds: float = 0.0
    total_seconds: float = 0.0


class Pending(Protocol):
    """A launched step."""

    def done(self) -> bool: ...

    def result(self) -> StepOutput:
        """Wait for the step. Raises what the step raised: then the whole batch has failed.

        `core.errors.OutOfMemory` alone leaves everything as it was before the step, but for two things: what the rows'
        new positions hold in the cache, and the slots, all of which the runner has emptied. Batches of the same epoch
        that were launched behind the step raise it too, unexecuted.
        """
        ...


class Runner(Protocol):
    """Executes steps strictly in the order of `launch`, as a device stream does.

    Because of that order, pages may be given to a new owner as soon as the step that last used them is launched, and
    KV that a launched step writes may be matched by the next batch.
    """

    num_pages: int
    page_size: int
    max_slots: int

    def launch(self, batch: Batch) -> Pending: ...

    def close(self) -> None: ...
