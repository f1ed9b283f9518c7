"""One call in flight: collects the chunks of its outputs, detokenises them, and ends them on a stop string."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Protocol

from phloem.core.errors import BadRequest, OutOfMemory, PhloemError, QueueFull
from phloem.core.messages import Chunk, Logprobs
from phloem.core.request import FinishReason

if TYPE_CHECKING:
    from phloem.client.counters import Counters
    from phloem.client.request import Output, Render, Sink

log = logging.getLogger("phloem.server")


class ClientGone(PhloemError):
    """The client has hung up: nobody reads this answer."""

    status = 499
    kind = "client_disconnected"


class Dropper(Protocol):
    """What a call needs of its client."""

    counters: Counters

    def drop(self, output: Output) -> bool: ...

    def finished(self, output: Output) -> None: ...


class Call:
    """Async iterator over the news of a call's outputs (see `GenerateRequest.stream`)."""

    def __init__(self, client: Dropper, outputs: list[Output], stream: bool, background: bool = False) -> None:
        self.outputs = outputs
        self.stream = stream
        self.background = background  # a client that leaves does not end it
        self._client = client
        self._open = len(outputs)
        self._dirty: dict[Output, None] = {}
        self._waiter: asyncio.Future[None] | None = None
        self._sleeps = False  # the reader waits, and there is nothing that it has not been given
        self._error: PhloemError | None = None
        self._render: Render | None = None
        self._sink: Sink | None = None

    # --- past the reader

    def render_by(self, render: Render) -> None:
        """From now on `render` alone makes what is written of news, unless they are an output's last.

        So nobody need wake the reader for them, which is most of what a token of a stream costs: see `pass_to`.
        """
        self._render = render if len(self.outputs) == 1 else None  # several write what they have together

    def pass_to(self, sink: Sink | None) -> None:
        """While the reader waits, give `sink` at once what `render_by` makes; None: all goes to the reader."""
        self._sink = sink
        if sink is None:
            self._sleep(False)

    def _sleep(self, sleeps: bool) -> None:
        self._sleeps = sleeps
        output = self.outputs[0]
        output.feed = None
        if sleeps and self._render is not None and self._sink is not None and output.item.stream_interval == 1:
            follow = output.decoder.follow if output.decoder is not None else None
            if follow is not None:
                output.feed = (follow, self._render, self._sink)

    # --- the receiving side

    def push(self, output: Output, chunk: Chunk) -> None:
        """Take what the engine sent; wake the reader when that is news to it."""
        output.pending.append(chunk)
        output.pending_tokens += len(chunk.tokens)
        if chunk.finish is None:
            # Without stream or stop strings nobody has anything to do before the end.
            if not (self.stream or _stops(output)):
                return
            if output.ids and output.pending_tokens < output.item.stream_interval:
                return
            if self._sleeps and self._render is not None and self._sink is not None:
                self._pass(output, self._render, self._sink)
                return
        self._dirty[output] = None
        self._wake()

    def fail(self, error: PhloemError) -> None:
        """End the call with this error, behind what has already arrived."""
        if self._error is None:
            self._error = error
            self._wake()

    def cancel(self) -> None:
        """Abort what still runs: the client has gone, or the reader has had enough. Harmless when repeated."""
        for output in self.outputs:
            self._client.counters.aborted += self._client.drop(output)
        self._dirty.clear()
        if self._open:
            self.fail(ClientGone("the client has disconnected"))

    def _wake(self) -> None:
        if self._sleeps:
            self._sleep(False)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _pass(self, output: Output, render: Render, sink: Sink) -> None:
        """Do the reader's part of some news. What ends the stream is still the reader's to tell."""
        try:
            self._absorb(output)
            data = render(output, output.delta) if output.finish is None else b""
        except Exception as error:
            self.broke(output, error)
            return
        if output.finish is not None:  # by a stop string
            self._dirty[output] = None
            self._wake()
        elif data:
            sink(data)

    def broke(self, output: Output, error: Exception) -> None:
        """The handling of an output has failed: the call ends with that."""
        self.fail(_failure(output, error))
        self.cancel()

    # --- the reading side

    def __aiter__(self) -> Call:
        return self

    async def __anext__(self) -> list[Output]:
        while True:
            if self._dirty:
                dirty = list(self._dirty)
                self._dirty.clear()
                for output in dirty:
                    self._absorb_guarded(output)
                if self.stream:
                    return dirty
                if not self._open:
                    return self.outputs
                continue
            if self._error is not None and self._open:
                raise self._error
            if not self._open:
                raise StopAsyncIteration
            self._waiter = asyncio.get_running_loop().create_future()
            self._sleep(True)
            try:
                await self._waiter
            except asyncio.CancelledError:
                self.cancel()
                raise
            finally:
                self._sleep(False)

    def _absorb_guarded(self, output: Output) -> None:
        try:
            self._absorb(output)
        except Exception as error:
            self.cancel()
            failure = _failure(output, error)
            if failure is error:
                raise
            raise failure from error

    def _absorb(self, output: Output) -> None:
        """Detokenise what is pending; settles `delta`, `new_from` and `finish`."""
        chunks, output.pending, output.pending_tokens = output.pending, [], 0
        if output.finish is not None:
            return
        output.new_from = len(output.ids)
        for chunk in chunks:
            _gather(output, chunk)
        last = chunks[-1]
        output.cached_tokens = last.cached_tokens or output.cached_tokens
        finish = last.finish
        _raise_refusal(finish)
        new = output.ids[output.new_from :]
        if output.decoder is not None:
            visible = new[:-1] if _trims_stop_token(output, finish, new) else new
            piece = output.decoder.push(visible, finish is not None)
            output.delta = piece.text
            output.parts.append(piece.text)
            if piece.stop is not None:
                _truncate(output, output.new_from + piece.keep)
                output.finish = finish = FinishReason(type="stop", matched=piece.stop)
                self._client.drop(output)
        if finish is not None:
            output.finish = finish
            self._open -= 1
            self._client.finished(output)


def _failure(output: Output, error: Exception) -> PhloemError:
    """What the client is told of an error in the handling of an output."""
    if isinstance(error, PhloemError):
        return error
    log.error("request %s failed in the door", output.id, exc_info=error)
    return PhloemError(f"request {output.id} failed: {type(error).__name__}")


def _stops(output: Output) -> bool:
    return bool(output.item.sampling.stop or output.item.sampling.stop_regex)


def _gather(output: Output, chunk: Chunk) -> None:
    output.ids += chunk.tokens
    if chunk.queue_seconds:
        output.queue_seconds = chunk.queue_seconds
    if chunk.logprobs is not None:
        output.logprobs.values += chunk.logprobs.values
        output.logprobs.top += chunk.logprobs.top
        output.logprobs.chosen += chunk.logprobs.chosen
    output.hidden += chunk.hidden
    if chunk.prompt_logprobs is not None:
        output.prompt_logprobs = chunk.prompt_logprobs


def _trims_stop_token(output: Output, finish: FinishReason | None, new: list[int]) -> bool:
    """A token that ended generation is not part of the text, unless asked for."""
    return (
        finish is not None
        and finish.type == "stop"
        and isinstance(finish.matched, int)
        and not output.item.sampling.no_stop_trim
        and bool(new)
        and new[-1] == finish.matched
    )


def _truncate(output: Output, length: int) -> None:
    del output.ids[length:], output.hidden[length:]
    kept: Logprobs = output.logprobs
    del kept.values[length:], kept.top[length:], kept.chosen[length:]


def _raise_refusal(finish: FinishReason | None) -> None:
    """An abort with a status is the engine's refusal or failure of this request."""
    if finish is None or finish.type != "abort" or finish.status_code is None:
        return
    message = finish.message or "the engine refused the request"
    kind = {400: BadRequest, 503: QueueFull, 507: OutOfMemory}.get(finish.status_code, PhloemError)
    error = kind(message)
    error.status = finish.status_code
    raise error
