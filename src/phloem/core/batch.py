"""The contract between scheduler and engine: one step's work, and what comes back.

Legend: R rows (requests in the step), T packed new tokens of all rows, P pages per row, G groups of memory.
A *slot* is the small integer that a running request keeps from admission to release; the engine holds a request's
sampling state and its last sampled token by slot, so that a step may be launched before the host knows that token.

A `Batch` is plain data: it could be sent to another process. What follows a grammar is handed to the runner beside it
(`Runner.constrain`), and what must run between two steps too (`Runner.between`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from phloem.core.media import Media
    from phloem.core.memory import Group
    from phloem.core.request import Align, SamplingParams

T_co = TypeVar("T_co", covariant=True)
T = TypeVar("T")

FROM_DEVICE = -1  # in `Batch.input_ids`: take the slot's last sampled token, which only the device knows yet
DRAFTED = FROM_DEVICE - 1  # likewise the first draft behind it; the second is one less, and so on


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
    return_routed: bool = False
    second: int = 0  # token at which the second segment of a pair of texts begins; 0: there is none
    namespace: str = ""  # of the cache: who shares prefixes with it
    audio: bytes = b""  # float32 features of what it hears: encoded into the slot's cross memory
    align: Align | None = None  # where its tokens attend in what it hears is wanted: `StepOutput.pooled`
    media: tuple[Media, ...] = ()  # pictures among its tokens, whose ids are then of content (`core.media`)
    constrained: bool = False  # a follower was given for this slot (`Runner.constrain`) before the launch


@dataclass(slots=True)
class Embeds:
    """Rows that stand in for token embeddings: of a picture, say."""

    start: int  # among the step's T tokens
    values: NDArray[np.float32]  # [n, hidden_size]


@dataclass(slots=True)
class Drafting:
    """What a model that drafts computes within a step, before the step verifies what it drafted.

    Of each row first the positions that it has not seen, all known tokens, then one position for each further draft.
    """

    counts: NDArray[np.int32]  # [R] drafts of each row
    starts: NDArray[np.int32]  # [R] the first position that it computes
    lens: NDArray[np.int32]  # [R] how many known ones; 0: nothing is computed for the row
    ids: NDArray[np.int32]  # [sum of lens] what it reads there: the positions' tokens, or those behind them


@dataclass(slots=True)
class Places:
    """Positions of a step whose tokens a model of diffusion is asked for, row by row. L of them."""

    rows: NDArray[np.int64]  # [L]
    at: NDArray[np.int64]  # [L] which of the step's T tokens
    draws: NDArray[np.int64]  # [L] the random draw there, of those of the row's seed
    mask: int  # the token that is never said; below 0: all may be
    heat: NDArray[np.float32] | None = None  # [L] what logits are divided by, where canvases are drawn anew


@dataclass(slots=True)
class Filled:
    """What was said at a step's `Places`."""

    tokens: NDArray[np.int32]  # [L]
    # [L] the probability of each token in the distribution that it was drawn from; where canvases are drawn anew, the
    # entropy there
    confidence: NDArray[np.float32]
    best: NDArray[np.int32] | None = None  # [L] the likeliest tokens, where canvases are drawn anew
    logprobs: dict[int, PositionLogprobs] = field(default_factory=dict)  # by place, where the row wants them


@dataclass(slots=True)
class Batch:
    """One step. Arrays are owned by the batch: nothing changes them after `launch`.

    A row's new tokens are the last of its known tokens and, in a step that verifies, drafts behind them: the last
    `outputs - 1` of the row's `input_ids` are then drafts, and each of the last `outputs` positions yields a token.
    """

    step: int
    slots: NDArray[np.int32]  # [R]
    query_lens: NDArray[np.int32]  # [R] new tokens of each row, at least 1
    prefix_lens: NDArray[np.int32]  # [R] tokens that are already in the row's memory
    input_ids: NDArray[np.int32]  # [T] token ids, FROM_DEVICE, or within a runner drafts from DRAFTED down
    # A table for each of the runner's groups, in their order. Pages: [R, P], page j holds positions
    # [j * page_size, (j + 1) * page_size), 0 where the window has left it behind. States: [R, 2], the slot that a
    # row's state is read from and the one it is written to; a row without a prefix begins from nothing.
    tables: tuple[NDArray[np.int32], ...]
    outputs: NDArray[np.int32]  # [R] how many of the row's last positions yield a token: 0, 1, or drafts + 1
    admissions: list[Admission] = field(default_factory=list)
    # Row -> prompt token at each new position + 1 (or -1: not wanted), for prompt logprobs. int32 [query_len of row]
    prompt_targets: dict[int, NDArray[np.int32]] = field(default_factory=dict)
    # [R] how many drafts a runner that speculates may put behind each row's token: pages for them are reserved, and the
    # row is not launched again before its step is committed. None: no row may have any.
    drafts: NDArray[np.int32] | None = None
    drafting: Drafting | None = None  # by the runner's own drafting model; None: it has none, or drafts nothing
    # [T] which of the step's tokens stands before each in its text, -1: what the row's memory ends with. Set where
    # drafts branch; None: the one before it.
    parents: NDArray[np.int32] | None = None
    adapters: NDArray[np.int32] | None = None  # [R] the adapter of each row, 0: none. None: no row has one
    # [R] of a model of diffusion: how many of the row's last tokens are its canvas (`core.denoising`), 0 or a block.
    # The runner fills them; the row yields nothing, or when the canvas is done its tokens. None: no row has one.
    canvas: NDArray[np.int32] | None = None
    places: Places | None = None  # what the runner asks for of these canvases
    embeds: list[Embeds] = field(default_factory=list)
    positions: NDArray[np.int64] | None = None  # [T] or [3, T]; None: those that follow from `prefix_lens`
    # Raised by the scheduler when a step failed for lack of memory: no batch of an older epoch counts any more.
    epoch: int = 0

    @property
    def num_rows(self) -> int:
        return len(self.slots)

    @property
    def num_tokens(self) -> int:
        return len(self.input_ids)

    @property
    def num_prompt_tokens(self) -> int:
        """Of prompts, less one a row: neither decoding rows nor their drafts count. Not of a step with canvases."""
        return int(np.maximum(self.query_lens - np.maximum(self.outputs, 1), 0).sum())

    @property
    def is_decode(self) -> bool:
        """True when every row has exactly one new token and yields one: the step a graph can serve."""
        return self.num_tokens == self.num_rows and bool((self.outputs == 1).all())


@dataclass(slots=True)
class PositionLogprobs:
    """Log probabilities at one position, in nats of the distribution before temperature and penalties."""

    token: float
    top: list[tuple[float, int]] = field(default_factory=list)  # (logprob, token id), best first
    chosen: list[tuple[float, int]] = field(default_factory=list)  # for `token_ids_logprob`


@dataclass(slots=True)
class StepOutput:
    """What a step gave.

    Row r yields `counts[r]` tokens: none, one, or the accepted drafts and one more. They lie one row behind the other
    in `tokens`. A row that failed, or whose position yields nothing, has the count 0.
    """

    step: int
    counts: NDArray[np.int32]  # [R]
    tokens: NDArray[np.int32]  # [sum of counts]
    # Row -> one for each of its tokens.
    logprobs: dict[int, list[PositionLogprobs]] = field(default_factory=dict)
    # Row -> wanted prompt positions, in order.
    prompt_logprobs: dict[int, list[PositionLogprobs]] = field(default_factory=dict)
    # Row -> [its tokens, hidden]: the states that its tokens were chosen from.
    hidden: dict[int, NDArray[np.float32]] = field(default_factory=dict)
    # Row -> (position, experts [tokens, layers, k]) of its new tokens; from 0 on when it entered its slot.
    routed: dict[int, tuple[int, NDArray[np.int16]]] = field(default_factory=dict)
    # Row -> what a model that does not generate makes of its text: [numbers], or [tokens, numbers]; or of a request
    # with `align`: [tokens, states].
    pooled: dict[int, NDArray[np.float32]] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)  # row -> why this row alone failed
    filled: Filled | None = None  # at `Batch.places`
    refused: set[int] = field(default_factory=set)  # of these, the rows whose own request is at fault
    encoded: int = 0  # pictures that the tower was run for
    found: int = 0  # and those whose embeddings were kept from before
    drafted: int = 0  # drafts that were verified, over all rows
    verified: NDArray[np.int32] | None = None  # [R] of them, each row's; None: the runner put no drafts behind any
    # Row -> which of its drafts were right, by their places behind the row's token; where drafts branch.
    branches: dict[int, list[int]] = field(default_factory=dict)
    drafting_seconds: float = 0.0  # of the runner's own drafting model
    forward_seconds: float = 0.0
    stage_seconds: float = 0.0  # in which the first of several stages computed, while it may have waited in between
    total_seconds: float = 0.0


class Pending(Protocol[T_co]):
    """Work that the runner has been given: a step, or what was asked for between two."""

    def done(self) -> bool: ...

    def result(self) -> T_co:
        """Wait for it. Raises what it raised: of a step, then the whole batch has failed.

        `core.errors.OutOfMemory` of a step alone leaves everything as it was before it, but for two things: what the
        rows' new positions hold in memory, and the slots, all of which the runner has emptied. Batches of the same
        epoch that were launched behind the step raise it too, unexecuted.
        """
        ...


class Follower(Protocol):
    """Follows one request's output by its constraint. Called in the runner's threads alone."""

    def masks(self, sampled: Sequence[int], drafts: Sequence[int]) -> list[NDArray[np.int32] | None]:
        """The tokens allowed next, and next after each of the drafts, as bit masks, 32 tokens a word.

        Args:
            sampled: tokens of this request chosen since the last call; they are taken for good.
            drafts: tokens that may follow; taken back before this returns.

        Returns:
            1 + len(drafts) masks or fewer: it ends behind a draft that is not allowed. None allows every token.

        Raises:
            Exception: this request alone fails; `BadRequest` puts the fault on the request.
        """
        ...


class Runner(Protocol):
    """Executes steps strictly in the order of `launch`, as a device stream does.

    Because of that order, pages may be given to a new owner as soon as the step that last used them is launched, and
    KV that a launched step writes may be matched by the next batch.
    """

    groups: tuple[Group, ...]  # of the model's memory, but for cross; tables of a batch are in this order
    num_pages: tuple[int, ...]  # of each group: pages, or slots of state; number 0 is scratch
    page_size: int
    max_slots: int

    @property
    def draft_room(self) -> int:
        """Drafts that it may make for a row in one step, at most; 0 where it does not speculate, or not for now."""
        ...

    @property
    def prepared(self) -> dict[str, Any]:
        """What has been recorded and compiled so far, for people."""
        ...

    @property
    def graph_bytes(self) -> int:
        """Device memory that recorded steps take; 0 where none are recorded."""
        ...

    def launch(self, batch: Batch) -> Pending[StepOutput]: ...

    def constrain(self, slot: int, follower: Follower | None) -> None:
        """What follows the request that the next launched batch admits to this slot; None: nothing any more."""
        ...

    def between(self, work: Callable[[], T]) -> Pending[T]:
        """Run `work` in the thread that runs the steps, behind every launched step and with none in flight."""
        ...

    def read_weight(self, name: str, rows: int) -> NDArray[np.float32]:
        """The first rows of a tensor that the checkpoint calls `name`, as its weights now are. For `between`.

        Raises:
            BadRequest: there is no such tensor, or so much of it is more than an answer should hold.
        """
        ...

    def close(self) -> None: ...


def sure(outputs: NDArray[np.int32]) -> NDArray[np.bool_]:
    """[R]: rows that are sure to yield exactly one token: those advance when they are launched."""
    return outputs == 1
