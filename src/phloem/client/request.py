"""What the door asks of `EngineClient`, and what it gets back. Free of HTTP: the in-process engine uses it too."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from phloem.core.messages import Chunk, Logprobs
from phloem.core.request import FinishReason, SamplingParams

if TYPE_CHECKING:
    from collections.abc import Callable

    from phloem.client.sessions import SessionStep
    from phloem.text.detokenizer import StreamDecoder


def new_id(prefix: str = "") -> str:
    return prefix + uuid.uuid4().hex


@dataclass(slots=True)
class Item:
    """One prompt, as text or as token ids, with how to continue it. `sampling.n` continuations are made.

    `logprob_start` is the first prompt position whose logprob is wanted; -1: none of the prompt's.
    """

    sampling: SamplingParams
    text: str | None = None
    ids: list[int] | None = None
    id: str = field(default_factory=new_id)
    add_special_tokens: bool = True
    return_logprob: bool = False
    logprob_start: int = -1
    top_logprobs: int = 0
    token_ids_logprob: list[int] = field(default_factory=list)
    priority: int = 0
    namespace: str = ""
    return_hidden: bool = False
    stream_interval: int = 1
    reasons: bool = False  # a reasoning block may come first, and no constraint holds in it
    session: SessionStep | None = None
    thinking_budget: int | None = None  # tokens of reasoning


@dataclass(slots=True)
class GenerateRequest:
    """One call: all items are validated before the first is submitted.

    With `stream` each iteration gives the outputs that have news; without, one iteration gives all, finished.
    `background`: it goes on to its end when the client leaves.
    """

    items: list[Item]
    stream: bool = False
    background: bool = False


if TYPE_CHECKING:
    Follow = Callable[[int], str]  # a token's text
    Render = Callable[["Output", str], bytes]  # the event of an output that has grown by this text; empty: none
    Sink = Callable[[bytes], None]  # takes an event that is to be written; never raises
    Feed = tuple[Follow, Render, Sink]


@dataclass(slots=True, eq=False)
class Output:
    """One continuation of one prompt, growing. `delta`, `new_from` describe what the last iteration added.

    `ids` are the output tokens that count (a matched stop token included; nothing behind a matched stop string);
    `new_from` is the index in `ids` of the first new one. Times are `time.monotonic()` seconds.
    """

    id: str  # of the continuation, as the engine knows it
    item: Item
    index: int  # of the prompt in the call
    choice: int  # of the continuation: 0 to n - 1
    prompt_ids: list[int]
    params: SamplingParams
    arrival: float
    # What every token touches comes first, and together: between two tokens the caches hold other things.
    feed: Feed | None = None  # while set, how the client handles a plain token (`Call.pass_to`)
    last_at: float = 0.0
    ids: list[int] = field(default_factory=list)
    new_from: int = 0
    parts: list[str] = field(default_factory=list)  # of `text`
    delta: str = ""
    finish: FinishReason | None = None
    cached_tokens: int = 0
    queue_seconds: float = 0.0
    first_at: float = 0.0
    logprobs: Logprobs = field(default_factory=Logprobs)
    prompt_logprobs: Logprobs | None = None
    hidden: list[bytes] = field(default_factory=list)  # per output token, float32
    # the client's own bookkeeping
    pending: list[Chunk] = field(default_factory=list)
    pending_tokens: int = 0
    decoder: StreamDecoder | None = None

    @property
    def text(self) -> str:
        if len(self.parts) > 1:
            self.parts = ["".join(self.parts)]
        return self.parts[0] if self.parts else ""

    @property
    def prompt_tokens(self) -> int:
        return len(self.prompt_ids)

    @property
    def completion_tokens(self) -> int:
        return len(self.ids)
