"""An engine without a model, behind the same link: deterministic tokens, refusals, delays and death on request."""

from __future__ import annotations

import asyncio
import hashlib
import math
from collections import deque
from dataclasses import dataclass, field

import numpy as np

from phloem.core.errors import EngineDead
from phloem.core.messages import (
    Abort,
    Chunk,
    Control,
    ControlReply,
    Drain,
    Draw,
    EngineLink,
    Failed,
    FromEngine,
    Heartbeat,
    Logprobs,
    Ready,
    Stats,
    Stopped,
    Submit,
    ToEngine,
    Tokens,
    decode_from_engine,
    decode_to_engine,
    encode,
    unpack_ids,
)
from phloem.core.request import FinishReason

LETTERS = b"abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ.,\n"


@dataclass
class _Running:
    submit: Submit
    prompt: list[int]
    out: list[int] = field(default_factory=list)


@dataclass
class FakeEngine(EngineLink):
    """One step gives every running request `per_step` tokens, in one `Tokens` message, as the real loop does.

    `mode`: `echo` repeats the prompt and then stops with `eos`; `hash` never stops by itself (letters from a hash of
    all tokens so far and the seed); `say` says `text` in bytes, then stops with `eos`. Every message
    makes the round trip through msgpack. `refuse`: request id -> (status, message); `failing`: request ids that fail at
    their second token.
    """

    mode: str = "hash"
    text: str = ""
    eos: int = 257
    delay: float = 0.0  # seconds per step
    per_step: int = 1
    ready: bool = True  # whether it says so at once
    beats: bool = True
    capacity: int = 1_000_000
    refuse: dict[str, tuple[int, str]] = field(default_factory=dict)
    refuse_all: tuple[int, str] | None = None
    failing: set[str] = field(default_factory=set)
    submits: list[Submit] = field(default_factory=list)
    aborts: list[Abort] = field(default_factory=list)
    controls: list[Control] = field(default_factory=list)
    control_reply: ControlReply | None = None
    silent_controls: bool = False
    step: int = 0
    paused: bool = False
    closed: bool = False

    def __post_init__(self) -> None:
        self._running: dict[str, _Running] = {}
        self._told: list[str] = []
        self._outbox: deque[bytes] = deque()
        self._alive = True
        self._reason: str | None = None
        self._wake = asyncio.Event()
        if self.ready:
            self.say(Ready(info={"max_total_num_tokens": self.capacity, "page_size": 1, "decisions": []}))
        if self.beats:
            self.say(Heartbeat())

    # --- the face of a link

    def send(self, message: ToEngine) -> None:
        if not self._alive:
            return
        message = decode_to_engine(encode(message))
        match message:
            case Submit():
                self.submits.append(message)
                self._submit(message)
            case Abort():
                self.aborts.append(message)
                if message.all:
                    self._running.clear()
                self._running.pop(message.id, None)
            case Control():
                self.controls.append(message)
                self._control(message)
            case Drain():
                self.say(Stopped())
            case Draw():
                raise TypeError("a fake engine writes; it draws nothing")
        self._wake.set()

    async def receive(self) -> FromEngine:
        while True:
            if self._outbox:
                # A real link gives way to other tasks between messages.
                await asyncio.sleep(0)
                return decode_from_engine(self._outbox.popleft())
            if self._reason is not None:
                raise EngineDead(self._reason)
            if self._running and not self.paused:
                await asyncio.sleep(self.delay)
                if self._alive:
                    self._step()
                continue
            self._wake.clear()
            await self._wake.wait()

    @property
    def alive(self) -> bool:
        return self._alive

    def close(self) -> None:
        self.closed = True
        self._alive = False
        self._wake.set()

    # --- for tests

    def say(self, message: FromEngine) -> None:
        self._outbox.append(encode(message))
        self._wake.set()

    def die(self, reason: str = "killed by signal 9", how: str = "raise") -> None:
        """`how`: `raise` from receive, a `failed` message, or `silent` (only `alive` tells)."""
        self._alive = False
        self._running.clear()
        if how == "raise":
            self._reason = reason
        elif how == "failed":
            self.say(Failed(error=reason, kind="RuntimeError"))
        self._wake.set()

    @property
    def running(self) -> int:
        return len(self._running)

    # --- inside

    def _submit(self, submit: Submit) -> None:
        refusal = self.refuse_all or self.refuse.get(submit.id)
        if refusal is not None:
            status, message = refusal
            finish = FinishReason(type="abort", message=message, status_code=status)
            self.say(Tokens(chunks=[Chunk(id=submit.id, finish=finish)]))
            return
        self._running[submit.id] = _Running(submit, unpack_ids(submit.input_ids).tolist())

    def _control(self, control: Control) -> None:
        if self.silent_controls:
            return
        if control.name in ("pause", "resume"):
            self.paused = control.name == "pause"
        reply = self.control_reply or ControlReply(id="", data={"num_running_reqs": len(self._running), "loaded": {}})
        self.say(ControlReply(id=control.id, ok=reply.ok, message=reply.message, data=reply.data))

    def _step(self) -> None:
        self.step += 1
        chunks = [self._advance(running) for running in list(self._running.values())]
        self.say(self._folded(chunks))
        self.say(Heartbeat(step=self.step))
        used = sum(len(item.prompt) + len(item.out) for item in self._running.values())
        self.say(Stats(running=len(self._running), used_tokens=used, total_tokens=self.capacity, step=self.step))

    def _folded(self, chunks: list[Chunk]) -> Tokens:
        """As the real loop sends them: of most requests only a token."""
        only = [chunk for chunk in chunks if chunk == Chunk(id=chunk.id, tokens=chunk.tokens[:1]) and chunk.tokens]
        message = Tokens(chunks=[chunk for chunk in chunks if chunk not in only])
        rows, message.plain = [chunk.id for chunk in only], [chunk.tokens[0] for chunk in only]
        if rows != self._told:
            message.rows = rows
        self._told = [] if message.chunks else rows
        return message

    def _advance(self, running: _Running) -> Chunk:
        submit, params = running.submit, running.submit.sampling
        first = not running.out
        tokens: list[int] = []
        finish: FinishReason | None = None
        limit = params.max_new_tokens if params.max_new_tokens is not None else 64
        if submit.id in self.failing and not first:
            finish = FinishReason(type="abort", message="the step failed for this request", status_code=500)
        while finish is None and len(tokens) < self.per_step:
            if len(running.out) >= limit:
                finish = FinishReason(type="length", length=len(running.out))
                break
            token = self._next(running)
            tokens.append(token)
            running.out.append(token)
            early = len(running.out) <= params.min_new_tokens
            if (token == self.eos and not params.ignore_eos and not early) or token in params.stop_token_ids:
                finish = FinishReason(type="stop", matched=token)
            elif len(running.out) >= limit:
                finish = FinishReason(type="length", length=len(running.out))
        if finish is not None:
            del self._running[submit.id]
        chunk = Chunk(id=submit.id, tokens=tokens, finish=finish)
        if first or finish is not None:
            chunk.cached_tokens, chunk.queue_seconds = len(running.prompt) // 2, 0.001
        if submit.return_hidden:
            chunk.hidden = [np.array([token, 0.5], dtype="<f4").tobytes() for token in tokens]
        if submit.return_logprob:
            chunk.logprobs = self._logprobs(submit, tokens)
            if first and submit.logprob_start >= 0:
                chunk.prompt_logprobs = self._logprobs(submit, running.prompt[max(submit.logprob_start, 1) :])
        return chunk

    def _next(self, running: _Running) -> int:
        if self.mode == "echo":
            at = len(running.out)
            return running.prompt[at] if at < len(running.prompt) else self.eos
        if self.mode == "say":
            said = self.text.encode()
            return said[len(running.out)] if len(running.out) < len(said) else self.eos
        seed = running.submit.sampling.sampling_seed
        data = repr((running.prompt, len(running.out), seed if seed is not None else running.submit.id)).encode()
        if running.submit.sampling.greedy:
            data = repr((running.prompt, len(running.out))).encode()
        return LETTERS[hashlib.blake2b(data, digest_size=2).digest()[0] % len(LETTERS)]

    def _logprobs(self, submit: Submit, tokens: list[int]) -> Logprobs:
        """Token t has logprob -log(t + 2); the top are tokens 0, 1, ..."""
        top = [(logprob_of(token), token) for token in range(submit.top_logprobs)]
        chosen = [(logprob_of(token), token) for token in submit.token_ids_logprob]
        return Logprobs(
            values=[logprob_of(token) for token in tokens],
            top=[top] * len(tokens) if top else [],
            chosen=[chosen] * len(tokens) if chosen else [],
        )


def logprob_of(token: int) -> float:
    return -math.log(token + 2)
