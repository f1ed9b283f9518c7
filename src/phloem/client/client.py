"""Text or token ids in, async text out: the door's only way to the engine.

One task receives from the engine link and hands each chunk to the call it belongs to; a call is woken at most once per
message and detokenises all that has arrived in one go, so a slow reader costs less, not more.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any

import msgspec

from phloem.client.admission import Admission
from phloem.client.call import Call
from phloem.client.counters import Counters
from phloem.client.request import GenerateRequest, Item, Output, new_id
from phloem.core.errors import BadRequest, EngineDead, QueueFull
from phloem.core.messages import (
    Abort,
    Chunk,
    Control,
    ControlReply,
    EngineLink,
    Failed,
    FromEngine,
    Heartbeat,
    Progress,
    Ready,
    Stats,
    Stopped,
    Submit,
    ToEngine,
    Tokens,
    pack_ids,
)
from phloem.core.request import FinishReason, SamplingParams
from phloem.text.detokenizer import StreamDecoder

if TYPE_CHECKING:
    from phloem.client.info import ModelInfo
    from phloem.client.request import Sink
    from phloem.client.sessions import Sessions
    from phloem.text.template import ChatTemplate
    from phloem.text.tokenizer import Tokenizer

log = logging.getLogger("phloem.server")

ALIVE_POLL = 0.25  # seconds between looks at `EngineLink.alive`
LAST_WORDS = 0.5  # seconds that a dead engine's reason may still be on its way
_SEED_STEP = 0x9E3779B97F4A7C15  # the odd constant of splitmix64: spreads the seeds of n continuations
_SEED_MASK = (1 << 63) - 1


class EngineClient:
    """Validates, tokenises, fans out, submits; demultiplexes what comes back.

    It outlives its engine: when the link dies every call in flight raises `EngineDead`, and so does every new one until
    `attach` brings a new link. Use it from one event loop only.
    """

    def __init__(self, tokenizer: Tokenizer | None, template: ChatTemplate | None, info: ModelInfo) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self.info = info
        self.admission = Admission(tokenizer, info)
        self.counters = Counters()
        self.dead: str | None = "no engine has been started"
        self.draining = False
        self.log_requests = False  # a line for each that ends; never its text
        self.engine: dict[str, Any] | None = None  # `Ready.info`; None until the engine is ready
        self.stats = Stats()
        self.heartbeat = Heartbeat()
        self.heard_at = time.monotonic()  # of the last message from the engine
        self.on_death: list[Callable[[str], None]] = []
        self._link: EngineLink | None = None
        self._active: dict[str, tuple[Call, Output]] = {}
        self._rows: list[tuple[Call, Output] | None] = []  # of the last `Tokens` that had some; None: aborted
        self._replies: dict[str, asyncio.Future[ControlReply]] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._changed: asyncio.Event | None = None  # readiness or death: whoever waits looks again
        self._started = False

    # --- life

    def attach(self, link: EngineLink, ready: dict[str, Any] | None = None) -> None:
        """Serve through this link from now on. `ready`: the engine's `Ready.info`, where the caller has taken it."""
        if self._link is not None and self.dead is None:
            self._die("the engine was replaced", expected=True)
        self._release()
        self._link, self.dead, self.engine = link, None, ready
        self.stats, self.heartbeat, self.heard_at = Stats(), Heartbeat(), time.monotonic()
        self._rows = []
        if self._started:
            self._spawn(link)

    def start(self) -> None:
        """Begin to receive. Call it inside the running event loop, once; links may be attached before or after."""
        self._started = True
        self._changed = asyncio.Event()
        if self._link is not None and self.dead is None:
            self._spawn(self._link)

    async def close(self) -> None:
        """End every call and let go of the link."""
        if self.dead is None:
            self._die("the server is shutting down", expected=True)
        tasks = self._tasks
        self._release()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def wait_ready(self) -> dict[str, Any]:
        """Wait for the engine's `Ready`, and give its info.

        Raises:
            EngineDead: if the engine ends first.
        """
        while self.engine is None:
            if self.dead is not None:
                raise EngineDead(self.dead)
            assert self._changed is not None, "start() comes first"
            self._changed.clear()
            await self._changed.wait()
        return self.engine

    async def drain(self, timeout: float) -> bool:
        """Refuse new calls; wait until those in flight have ended. False when the timeout came first."""
        self.draining = True
        deadline = time.monotonic() + timeout
        while self._active and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        return not self._active

    @property
    def sessions(self) -> Sessions:
        return self.admission.sessions

    @property
    def in_flight(self) -> int:
        """Continuations that the engine works on."""
        return len(self._active)

    def _spawn(self, link: EngineLink) -> None:
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(self._receive(link)), loop.create_task(self._watch(link))]

    def _release(self) -> None:
        for task in self._tasks:
            task.cancel()
        self._tasks = []
        if self._link is not None:
            self._link.close()
        self._link = None

    # --- from the engine

    async def _receive(self, link: EngineLink) -> None:
        try:
            await link.deliver(self._take)
        except asyncio.CancelledError:
            raise
        except EngineDead as error:
            self._die(error.message)
        except Exception as error:
            log.exception("the link to the engine broke")
            self._die(f"the link to the engine broke: {type(error).__name__}: {error}")

    async def _watch(self, link: EngineLink) -> None:
        while link.alive:
            await asyncio.sleep(ALIVE_POLL)
        # A reason in the engine's own words is worth a moment.
        await asyncio.sleep(LAST_WORDS)
        self._die("the engine process has ended")

    def _take(self, message: FromEngine) -> bool:
        self._handle(message)
        return self.dead is None

    def _handle(self, message: FromEngine) -> None:
        self.heard_at = time.monotonic()
        match message:
            case Tokens():
                self._on_tokens(message, self.heard_at)
            case Heartbeat():
                self.heartbeat = message
            case Stats():
                self.stats = message
                self.counters.on_stats(message)
            case ControlReply():
                future = self._replies.pop(message.id, None)
                if future is not None and not future.done():
                    future.set_result(message)
            case Ready():
                self.engine = message.info
                self._notify()
            case Progress():
                log.info("engine: %s took %.2f s", message.phase, message.seconds)
            case Failed():
                self._die(f"the engine failed: {message.kind or 'error'}: {message.error}")
            case Stopped():
                self._die("the engine has stopped")

    def _on_tokens(self, message: Tokens, now: float) -> None:
        if message.rows is not None:
            self._rows = [self._active.get(key) for key in message.rows]
        if message.plain:
            self._on_plain(message.plain, now)
        for chunk in message.chunks:
            entry = self._active.get(chunk.id)
            if entry is None:
                continue  # aborted meanwhile
            call, output = entry
            self.counters.on_chunk(output, chunk, now)
            if chunk.finish is not None:
                del self._active[chunk.id]
            call.push(output, chunk)

    def _on_plain(self, tokens: list[int], now: float) -> None:
        """One token for each of the rows. What their streams write is all made before the first of it is written: each
        write wakes a client, and whoever runs in between leaves cold caches behind."""
        gaps: dict[float, int] = {}  # requests that had their last token at the same time, as most have
        events: list[tuple[Sink, bytes]] = []
        for entry, token in zip(self._rows, tokens, strict=True):
            if entry is None:
                continue
            call, output = entry
            feed = output.feed
            if feed is None and self._active.get(output.id) is not entry:
                continue  # aborted meanwhile
            gaps[output.last_at] = gaps.get(output.last_at, 0) + 1
            output.last_at = now
            if feed is None:
                call.push(output, Chunk(id=output.id, tokens=[token]))
                continue
            follow, render, sink = feed
            output.new_from = len(output.ids)
            output.ids.append(token)
            try:
                text = follow(token)
                output.parts.append(text)
                data = render(output, text)
            except Exception as error:
                call.broke(output, error)
                continue
            if data:
                events.append((sink, data))
        for sink, data in events:
            sink(data)
        for last_at, count in gaps.items():
            self.counters.on_tokens(count, now - last_at)

    def _die(self, reason: str, expected: bool = False) -> None:
        if self.dead is not None:
            return
        self.dead, self.engine, self.stats = reason, None, Stats()
        level = logging.INFO if (expected or self.draining) and not self._active else logging.ERROR
        log.log(level, "engine gone: %s (%d requests in flight)", reason, len(self._active))
        active, self._active = self._active, {}
        for call, output in active.values():
            self._end_in_session(output, None)
            call.fail(EngineDead(reason))
        replies, self._replies = self._replies, {}
        for future in replies.values():
            if not future.done():
                future.set_exception(EngineDead(reason))
        self._notify()
        for callback in self.on_death:
            callback(reason)

    def _notify(self) -> None:
        if self._changed is not None:
            self._changed.set()

    # --- to the engine

    async def submit(self, request: GenerateRequest) -> Call:
        """Validate every item, then submit all. The caller iterates the call, and ends it with `cancel()`.

        Raises:
            BadRequest: an item can never be served; nothing has been submitted.
            QueueFull: the server is draining.
            EngineDead: there is no engine.
        """
        self._check_open()
        prompts = await self.admission.prompts(request.items)
        outputs = self._outputs(request, prompts)
        self._check_open()  # again: tokenising may have taken a while
        taken = [output.id for output in outputs if output.id in self._active]
        if taken or len({output.id for output in outputs}) < len(outputs):
            raise BadRequest(f"rid {(taken or [outputs[0].id])[0]!r} is in use by another request", param="rid")
        self.sessions.check_several([output.item.session for output in outputs if output.item.session is not None])
        call = Call(self, outputs, request.stream, request.background)
        for output in outputs:
            self._active[output.id] = (call, output)
            if output.item.session is not None:
                self.sessions.begin(output.item.session, output.id, output.prompt_ids, output.choice)
        try:
            for output in outputs:
                self._send(_submit_message(output))
        except BaseException:
            call.cancel()
            raise
        return call

    async def generate(self, request: GenerateRequest) -> AsyncIterator[list[Output]]:
        """`submit`, then iterate; leaving the iteration early (or being cancelled) aborts what still runs."""
        call = await self.submit(request)
        try:
            async for outputs in call:
                yield outputs
        finally:
            call.cancel()

    def _outputs(self, request: GenerateRequest, prompts: list[list[int]]) -> list[Output]:
        now = time.monotonic()
        outputs: list[Output] = []
        for index, (item, ids) in enumerate(zip(request.items, prompts, strict=True)):
            params = self.admission.params(item, ids)
            for choice in range(params.n):
                output = Output(
                    id=item.id if params.n == 1 else f"{item.id}-{choice}",
                    item=item,
                    index=index,
                    choice=choice,
                    prompt_ids=ids,
                    params=_params_of_choice(params, choice),
                    arrival=now,
                )
                if self.tokenizer is not None:
                    output.decoder = StreamDecoder(self.tokenizer, params)
                outputs.append(output)
        return outputs

    def _check_open(self) -> None:
        if self.draining:
            raise QueueFull("the server is shutting down and takes no new requests", code="draining")
        if self.dead is not None:
            raise EngineDead(self.dead)

    def _send(self, message: ToEngine) -> None:
        """Raises EngineDead; the link may know of its engine's end before anything was received."""
        if self.dead is not None or self._link is None:
            raise EngineDead(self.dead or "no engine has been started")
        self._link.send(message)

    def drop(self, output: Output) -> bool:
        """Stop the engine's work on an output, if it still works on it. Sends at most one `Abort` per output."""
        entry = self._active.get(output.id)
        if entry is None or entry[1] is not output:
            return False
        del self._active[output.id]
        output.feed = None
        if output.finish is None:
            self._end_in_session(output, None)
        with contextlib.suppress(EngineDead):
            self._send(Abort(id=output.id))
        return True

    def finished(self, output: Output) -> None:
        """An output has its finish reason."""
        self.counters.on_finish(output)
        failed = output.finish is None or output.finish.type == "abort"
        self._end_in_session(output, None if failed else output.ids)
        if self.log_requests and output.finish is not None:
            now = time.monotonic()
            log.info(
                "request %s: %d prompt tokens (%d cached), %d output tokens, %s; queued %.3f s, first token %.3f s, "
                "whole %.3f s",
                output.id,
                output.prompt_tokens,
                output.cached_tokens,
                output.completion_tokens,
                output.finish.type,
                output.queue_seconds,
                (output.first_at or now) - output.arrival,
                now - output.arrival,
            )

    def _end_in_session(self, output: Output, ids: list[int] | None) -> None:
        if output.item.session is not None:
            self.sessions.end(output.item.session, output.id, ids)

    def abort(self, rid: str = "", everything: bool = False) -> int:
        """End requests by id (that of the request or of one continuation); they finish with reason `abort`."""
        ended = [
            (call, output) for call, output in self._active.values() if everything or rid in (output.item.id, output.id)
        ]
        for call, output in ended:
            self.counters.aborted += self.drop(output)
            reason = FinishReason(type="abort", message="the request was aborted")
            call.push(output, Chunk(id=output.id, finish=reason))
        return len(ended)

    async def control(self, name: str, /, deadline: float | None = 60.0, **args: Any) -> ControlReply:
        """An administrative call (names in `core/messages.py:Control`).

        Raises:
            EngineDead: there is no engine, or it gave no answer within `deadline` seconds.
        """
        key = new_id()
        future: asyncio.Future[ControlReply] = asyncio.get_running_loop().create_future()
        self._replies[key] = future
        try:
            self._send(Control(id=key, name=name, args=args))
            return await asyncio.wait_for(future, deadline)
        except TimeoutError:
            raise EngineDead(f"the engine did not answer {name!r} within {deadline:g} s") from None
        finally:
            self._replies.pop(key, None)


def _params_of_choice(params: SamplingParams, choice: int) -> SamplingParams:
    """What the engine sees: one continuation, no stop strings, a seed of its own."""
    seed = params.sampling_seed
    if seed is not None:
        seed = (seed + choice * _SEED_STEP) & _SEED_MASK
    return msgspec.structs.replace(params, n=1, stop=[], stop_regex=[], sampling_seed=seed)


def _submit_message(output: Output) -> Submit:
    item: Item = output.item
    return Submit(
        id=output.id,
        input_ids=pack_ids(output.prompt_ids),
        sampling=output.params,
        priority=item.priority,
        namespace=item.namespace,
        return_logprob=item.return_logprob,
        logprob_start=item.logprob_start if item.return_logprob else -1,
        top_logprobs=item.top_logprobs,
        token_ids_logprob=item.token_ids_logprob,
        return_hidden=item.return_hidden,
        arrival=time.time(),
        grammar_at_once=not item.reasons,
    )
