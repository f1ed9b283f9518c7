"""One continuation of one prompt: what has come of it, and how the engine's news become text.

It knows its consumer and nothing above it: the client gives it news, and tells its consumer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from phloem.core.errors import BadRequest, OutOfMemory, PhloemError, QueueFull
from phloem.core.messages import Logprobs
from phloem.core.request import FinishReason

if TYPE_CHECKING:
    from collections.abc import Mapping

    from phloem.client.request import Item
    from phloem.core.media import Media
    from phloem.core.messages import Chunk, Did
    from phloem.core.request import SamplingParams
    from phloem.text.detokenizer import StreamDecoder
    from phloem.utils.tracing import Span

Follow = Callable[[int], str]  # a token's text
Frame = Callable[["Continuation", str], bytes]  # the event of a continuation that has grown by this text; empty: none
Write = Callable[[bytes], bool]  # takes an event; False: not now, and it has not been taken


class Consumer(ABC):
    """Who gets a continuation's news (`client/consumers.py`).

    `follow`: where set, a token that brings nothing but its text need not go through `news`: its text is framed by
    `frame`, and what comes of it given to `write`, or to `hold` where that refuses.
    """

    __slots__ = ()
    follow: Follow | None
    frame: Frame
    write: Write

    @abstractmethod
    def news(self, continuation: Continuation) -> None:
        """It has grown, or ended."""

    @abstractmethod
    def fail(self, error: PhloemError) -> None:
        """No more will come, because of this."""

    @abstractmethod
    def hold(self, data: bytes) -> None:
        """An event that the connection refused."""


@dataclass(slots=True, eq=False)
class Continuation:
    """Grows by `take`. `delta` and `ids[new_from:]` are what the consumer was given by its last `read`.

    `ids` are the output tokens that count (a matched stop token included; nothing behind a matched stop string). Times
    are `time.monotonic()` seconds.
    """

    id: str  # as the engine knows it
    item: Item
    index: int  # of the prompt in the call
    choice: int  # 0 to n - 1, of this prompt
    prompt_ids: list[int]
    media: list[Media]
    params: SamplingParams
    arrival: float
    consumer: Consumer
    # What every token touches comes first, and together: between two tokens the caches hold other things.
    live: bool = False  # the engine works on it
    last_at: float = 0.0
    ids: list[int] = field(default_factory=list)
    new_from: int = 0  # in `ids`
    parts: list[str] = field(default_factory=list)  # of `text`
    delta: str = ""
    finish: FinishReason | None = None
    cached_tokens: int = 0
    cached_host: int = 0  # as `Chunk.cached_host`
    cached_storage: int = 0
    queue_seconds: float = 0.0
    drafts: list[int] = field(default_factory=list)  # as `Chunk.drafts`
    passes: int = 0  # as `Chunk.passes`
    first_at: float = 0.0
    logprobs: Logprobs = field(default_factory=Logprobs)
    prompt_logprobs: Logprobs | None = None
    hidden: list[bytes] = field(default_factory=list)  # per output token, float32
    routed: list[bytes] = field(default_factory=list)  # as `Chunk.routed`
    routed_width: int = 0  # numbers of each token in it
    version: str = ""  # of the weights that its next token is of
    spans: list[tuple[int, str]] = field(default_factory=list)  # (end, version) of tokens of other weights before
    dp_rank: int = -1  # the replica that has it, once it has told; -1: there is but one
    pooled: bytes = b""  # float32: what a model that does not generate has made of the text; or as `Item.align` asks
    decoder: StreamDecoder | None = None
    whole: bool = False  # nobody looks before the end: its text is made in one go
    unread: list[str] = field(default_factory=list)  # of the text: what `read` will give
    was_read: bool = True  # the next token begins a new `delta`
    trace: Span | None = None  # of the HTTP request; None: nobody asked
    did: list[Did] = field(default_factory=list)  # what the engine says that it did, where there is a `trace`

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

    def take(self, chunk: Chunk) -> None:
        """More tokens, as text; settles `finish`, by a stop string too.

        Raises:
            PhloemError: the engine refused or failed the request, or a stop regex takes too long.
        """
        if self.was_read:
            self.was_read, self.new_from = False, 0 if self.whole else len(self.ids)
        begin = 0 if self.whole else len(self.ids)
        self._gather(chunk)
        finish = chunk.finish
        _raise_refusal(finish, self.item.names)
        if finish is not None and finish.type == "abort" and not self.ids:
            # Rollout workers tell by the text that there is nothing to go on from.
            finish = FinishReason(type="abort", message=f"Abort before prefill: {finish.message}")
        if self.decoder is not None and (finish is not None or not self.whole):
            new = self.ids[begin:]
            piece = self.decoder.push(new[:-1] if self._trims(finish, new) else new, finish is not None)
            if piece.text:
                self.parts.append(piece.text)
                self.unread.append(piece.text)
            if piece.stop is not None:
                self._truncate(begin + piece.keep)
                finish = FinishReason(type="stop", matched=piece.stop)
        self.finish = finish

    def read(self) -> str:
        """The text that is new since the last time; settles `delta` and `new_from`."""
        self.delta = "".join(self.unread)
        self.unread.clear()
        self.was_read = True
        return self.delta

    @property
    def unread_tokens(self) -> int:
        return 0 if self.was_read else len(self.ids) - self.new_from

    def _gather(self, chunk: Chunk) -> None:
        self.ids += chunk.tokens
        self.cached_tokens = chunk.cached_tokens or self.cached_tokens
        self.cached_host = chunk.cached_host or self.cached_host
        self.cached_storage = chunk.cached_storage or self.cached_storage
        self.drafts = chunk.drafts or self.drafts
        self.passes = chunk.passes or self.passes
        if chunk.dp_rank >= 0:
            self.dp_rank = chunk.dp_rank
        if chunk.queue_seconds:
            self.queue_seconds = chunk.queue_seconds
        if chunk.logprobs is not None:
            self.logprobs.values += chunk.logprobs.values
            self.logprobs.top += chunk.logprobs.top
            self.logprobs.chosen += chunk.logprobs.chosen
        self.hidden += chunk.hidden
        self.did += chunk.did
        if chunk.routed:
            if not self.routed:
                self.routed_width = len(chunk.routed) // 2 // max(1, len(self.prompt_ids) + len(self.ids) - 1)
            self.routed.append(chunk.routed)
        self.pooled = chunk.pooled or self.pooled
        if chunk.prompt_logprobs is not None:
            self.prompt_logprobs = chunk.prompt_logprobs

    def reweighted(self, version: str) -> None:
        """Tokens from now on are of other weights."""
        begun = self.spans[-1][0] if self.spans else 0
        if len(self.ids) > begun:
            self.spans.append((len(self.ids), self.version))
        self.version = version

    def versions(self) -> list[tuple[str, int, int]]:
        """(version, first token, end) over the output; empty where all of it is of the same weights."""
        found: list[tuple[str, int, int]] = []
        for end, version in [*self.spans, (len(self.ids), self.version)]:
            begin = found[-1][2] if found else 0
            if min(end, len(self.ids)) > begin:
                found.append((version, begin, min(end, len(self.ids))))
        return found if len(found) > 1 else []

    def _trims(self, finish: FinishReason | None, new: list[int]) -> bool:
        """A token that ended generation is not part of the text, unless asked for."""
        return (
            finish is not None
            and finish.type == "stop"
            and isinstance(finish.matched, int)
            and not self.item.sampling.no_stop_trim
            and bool(new)
            and new[-1] == finish.matched
        )

    def _truncate(self, length: int) -> None:
        del self.ids[length:], self.hidden[length:]
        known = self.logprobs
        del known.values[length:], known.top[length:], known.chosen[length:]


def _raise_refusal(finish: FinishReason | None, names: Mapping[str, str]) -> None:
    """An abort with a status is the engine's refusal or failure of this request. `names`: as `Item.names`."""
    if finish is None or finish.type != "abort" or finish.status_code is None:
        return
    message = finish.message or "the engine refused the request"
    kind = {400: BadRequest, 503: QueueFull, 507: OutOfMemory}.get(finish.status_code, PhloemError)
    param = names.get(finish.param or "", finish.param)
    if finish.param and param and message.startswith(f"{finish.param}: "):
        message = param + message.removeprefix(finish.param)
    error = kind(message, param=param, code=finish.code)
    error.status, error.retry_after = finish.status_code, finish.retry_after
    raise error
