"""The continuations in flight: what the engine tells goes to the one it belongs to, and what ends is told to it."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from phloem.client import traces
from phloem.core.errors import EngineDead, PhloemError
from phloem.core.messages import Abort, Chunk
from phloem.core.request import FinishReason
from phloem.utils.log import fields

if TYPE_CHECKING:
    from phloem.client.continuation import Consumer, Continuation
    from phloem.client.counters import Counters
    from phloem.client.sessions import Sessions
    from phloem.core.messages import ToEngine, Tokens

log = logging.getLogger("phloem.server")


class Flow:
    """Client > continuation > consumer: nothing points back.

    Args:
        send: to the engine; raises EngineDead.
    """

    def __init__(self, send: Callable[[ToEngine], None], counters: Counters, sessions: Sessions) -> None:
        self.active: dict[str, Continuation] = {}
        self.version = ""  # of the weights, as the engine said last
        self.log_requests = False  # a line for each that ends; never its text
        self._send = send
        self._counters = counters
        self._sessions = sessions
        self._rows: list[Continuation | None] = []  # of the last `Tokens` that had some; None: aborted

    def add(self, continuation: Continuation) -> None:
        """The engine is about to be asked for it."""
        continuation.live, continuation.version = True, self.version
        self.active[continuation.id] = continuation
        step = continuation.item.session
        if step is not None:
            self._sessions.begin(step, continuation.id, continuation.prompt_ids, continuation.choice)

    # --- from the engine

    def on_weights(self, version: str, rank: int = -1) -> None:
        """`rank`: of this replica's requests alone."""
        self.version = version
        for continuation in self.active.values():
            if rank == -1 or continuation.dp_rank in (-1, rank):
                continuation.reweighted(version)

    def on_tokens(self, message: Tokens, now: float) -> None:
        if message.rows is not None:
            self._rows = [self.active.get(key) for key in message.rows]
        if message.plain:
            self._on_plain(message.plain, now)
        for chunk in message.chunks:
            continuation = self.active.get(chunk.id)
            if continuation is None:
                continue  # aborted meanwhile
            self._counters.on_chunk(continuation, chunk, now)
            if chunk.finish is not None:
                self._remove(continuation)
            self._give(continuation, chunk)

    def _on_plain(self, tokens: list[int], now: float) -> None:
        """One token for each of the rows. What their streams write is all made before the first of it is written: each
        write wakes a client, and whoever runs in between leaves cold caches behind."""
        gaps: dict[float, int] = {}  # requests that had their last token at the same time, as most have
        events: list[tuple[Consumer, bytes]] = []
        for continuation, token in zip(self._rows, tokens, strict=True):
            if continuation is None or not continuation.live:
                continue  # aborted meanwhile
            gaps[continuation.last_at] = gaps.get(continuation.last_at, 0) + 1
            continuation.last_at = now
            if continuation.whole:
                continuation.ids.append(token)  # nobody looks before the end
                continue
            consumer = continuation.consumer
            if (follow := consumer.follow) is None:
                self._give(continuation, Chunk(id=continuation.id, tokens=[token]))
                continue
            continuation.new_from = len(continuation.ids)
            continuation.ids.append(token)
            try:
                text = follow(token)
                continuation.parts.append(text)
                data = consumer.frame(continuation, text)
            except Exception as error:
                self._broke(continuation, error)
                continue
            if data:
                events.append((consumer, data))
        for consumer, data in events:
            if not consumer.write(data):
                consumer.hold(data)
        for last_at, count in gaps.items():
            self._counters.on_tokens(count, now - last_at)

    def _give(self, continuation: Continuation, chunk: Chunk) -> None:
        try:
            continuation.take(chunk)
            if continuation.finish is not None:
                self._ended(continuation)
            continuation.consumer.news(continuation)
        except Exception as error:
            self._broke(continuation, error)

    def _broke(self, continuation: Continuation, error: Exception) -> None:
        """The handling of a continuation has failed: all that its consumer waits for ends with that."""
        if isinstance(error, PhloemError):
            failure = error
        else:
            log.error("request %s failed in the door", continuation.id, exc_info=error)
            failure = PhloemError(f"request {continuation.id} failed: {type(error).__name__}")
            failure.__cause__ = error
        self._end_in_session(continuation, None)
        continuation.consumer.fail(failure)
        self.drop_all([other for other in self.active.values() if other.consumer is continuation.consumer])

    # --- ends

    def _remove(self, continuation: Continuation) -> bool:
        """Whether it was still there."""
        if not continuation.live:
            return False
        continuation.live = False
        del self.active[continuation.id]
        return True

    def _ended(self, continuation: Continuation) -> None:
        """It has its finish reason; where that is a stop string, the engine does not know."""
        if self._remove(continuation):
            self._abort(continuation)
        self._counters.on_finish(continuation)
        assert continuation.finish is not None
        traces.tell(continuation, continuation.finish.type)
        self._end_in_session(continuation, None if continuation.finish.type == "abort" else continuation.ids)
        if self.log_requests:
            _log_end(continuation)

    def drop_all(self, several: list[Continuation]) -> None:
        """Stop the engine's work on those that it still works on. Sends at most one `Abort` for each."""
        for continuation in several:
            if self._remove(continuation):
                self._counters.aborted += 1
                traces.tell(continuation, "abort")
                self._end_in_session(continuation, None)
                self._abort(continuation)

    def abort(self, rid: str = "", everything: bool = False) -> int:
        """End requests by id (that of the request or of one continuation); they finish with reason `abort`."""
        found = [item for item in self.active.values() if everything or rid in (item.item.id, item.id)]
        self.drop_all(found)
        for continuation in found:
            reason = FinishReason(type="abort", message="the request was aborted")
            self._give(continuation, Chunk(id=continuation.id, finish=reason))
        return len(found)

    def fail_all(self, error: PhloemError) -> None:
        """The engine is gone."""
        active, self.active, self._rows = self.active, {}, []
        for continuation in active.values():
            continuation.live = False
            self._end_in_session(continuation, None)
            continuation.consumer.fail(error)

    def lose(self, ids: list[str], error: PhloemError) -> None:
        """The engine of these alone is gone; what belongs to the same calls is dropped."""
        for key in ids:
            continuation = self.active.get(key)
            if continuation is None:
                continue  # it went with another of its call
            self._remove(continuation)
            self._end_in_session(continuation, None)
            continuation.consumer.fail(error)
            self.drop_all([other for other in self.active.values() if other.consumer is continuation.consumer])

    def _abort(self, continuation: Continuation) -> None:
        with contextlib.suppress(EngineDead):
            self._send(Abort(id=continuation.id))

    def _end_in_session(self, continuation: Continuation, ids: list[int] | None) -> None:
        if continuation.item.session is not None:
            self._sessions.end(continuation.item.session, continuation.id, ids)


def _log_end(continuation: Continuation) -> None:
    now, item = time.monotonic(), continuation
    finish = item.finish.type if item.finish is not None else "?"
    first, whole = (item.first_at or now) - item.arrival, now - item.arrival
    log.info(
        "request %s: %d prompt tokens (%d cached), %d output tokens, %s; queued %.3f s, first token %.3f s, "
        "whole %.3f s",
        item.id, item.prompt_tokens, item.cached_tokens, item.completion_tokens, finish, item.queue_seconds, first,
        whole,
        extra=fields(
            request_id=item.id, prompt_tokens=item.prompt_tokens, cached_tokens=item.cached_tokens,
            output_tokens=item.completion_tokens, finish=finish, queue_seconds=round(item.queue_seconds, 6),
            first_token_seconds=round(first, 6), seconds=round(whole, 6),
        ),
    )  # fmt: skip
