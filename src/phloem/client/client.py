"""Text or token ids in, async text out: the door's only way to the engine.

`Connection` minds the engine, `Admission` checks and tokenises, `Flow` brings what comes back to the continuation it
belongs to, whose consumer writes it or wakes a reader: at most once per message, however much has arrived.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec

from phloem.client.admission import Admission
from phloem.client.call import Call
from phloem.client.connection import Connection
from phloem.client.consumers import Reader
from phloem.client.continuation import Continuation
from phloem.client.counters import Counters
from phloem.client.flow import Flow
from phloem.client.pictures import Easel, Painting
from phloem.core.errors import BadRequest, EngineDead, QueueFull
from phloem.core.media import with_content
from phloem.core.messages import (
    ControlReply,
    Draw,
    EngineLink,
    FromEngine,
    Lost,
    Painted,
    Reweighted,
    Stats,
    Submit,
    Tokens,
    pack_ids,
)
from phloem.core.request import SamplingParams
from phloem.text.detokenizer import StreamDecoder
from phloem.utils.tracing import CURRENT

if TYPE_CHECKING:
    from phloem.client.info import ModelInfo
    from phloem.client.request import GenerateRequest, Prompt
    from phloem.client.sessions import Sessions
    from phloem.multimodal._reader import MediaReader
    from phloem.text.template import ChatTemplate
    from phloem.text.tokenizer import Tokenizer

log = logging.getLogger("phloem.server")

LOAD_SECONDS = 300.0  # for an adapter to be read and placed
DECODERS = 2  # files that are decoded at a time: each has all its samples in memory
_SEED_STEP = 0x9E3779B97F4A7C15  # the odd constant of splitmix64: spreads the seeds of n continuations
_SEED_MASK = (1 << 63) - 1


class EngineClient:
    """Validates, tokenises, fans out, submits.

    It outlives its engine: when the link dies every call in flight raises `EngineDead`, and so does every new one until
    `attach` brings a new link. Use it from one event loop only.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        template: ChatTemplate | None,
        info: ModelInfo,
        pictures: MediaReader | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self.info = info
        self.pictures = pictures
        self.admission = Admission(tokenizer, info, pictures)
        self.decoders = asyncio.Semaphore(DECODERS)  # of sound files
        self.counters = Counters()
        self.draining = False
        self.unfit = ""  # why the engine's weights cannot serve
        self.on_death: list[Callable[[str], None]] = []
        self.connection = Connection(self._take, self._end)
        self.flow = Flow(self.connection.send, self.counters, self.admission.sessions)
        self.easel = Easel(self.connection.send, self.counters)

    # --- life

    def attach(self, link: EngineLink, ready: dict[str, Any] | None = None) -> None:
        """Serve through this link from now on. `ready`: the engine's `Ready.info`, where the caller has taken it."""
        self.unfit, self.flow.version = "", self.info.weight_version
        self.info.duty.now = self.info.duty.configured  # an engine that is new
        self.connection.attach(link, ready)

    def start(self) -> None:
        """Begin to receive. Call it inside the running event loop, once; links may be attached before or after."""
        self.connection.start()

    async def close(self) -> None:
        """End every call and let go of the link."""
        await self.connection.close()
        if self.pictures is not None:
            self.pictures.close()

    async def wait_ready(self) -> dict[str, Any]:
        """Wait for the engine's `Ready`, and give its info.

        Raises:
            EngineDead: if the engine ends first.
        """
        return await self.connection.wait_ready()

    async def drain(self, timeout: float) -> bool:
        """Refuse new calls; wait until those in flight have ended. False when the timeout came first."""
        self.draining = True
        deadline = time.monotonic() + timeout
        while self.in_flight and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        return not self.in_flight

    @property
    def dead(self) -> str | None:
        """Why there is no engine; None while there is one."""
        return self.connection.dead

    @property
    def weight_version(self) -> str:
        """As the engine said last."""
        return self.flow.version

    @property
    def sessions(self) -> Sessions:
        return self.admission.sessions

    @property
    def in_flight(self) -> int:
        """Continuations and pictures that the engine works on."""
        return len(self.flow.active) + len(self.easel.active)

    def _take(self, message: FromEngine, now: float) -> None:
        if isinstance(message, Tokens):
            self.flow.on_tokens(message, now)
        elif isinstance(message, Painted):
            self.easel.on_painted(message, now)
        elif isinstance(message, Stats):
            self.counters.on_stats(message)
        elif isinstance(message, Reweighted):
            self.unfit = message.unfit
            self.flow.on_weights(message.version, message.dp_rank)
        elif isinstance(message, Lost):
            self.flow.lose(message.ids, EngineDead(message.error))

    def _end(self, error: EngineDead, expected: bool) -> None:
        meant = expected or self.draining
        level = logging.ERROR if not meant else logging.WARNING if self.in_flight else logging.INFO
        log.log(level, "engine gone: %s (%d requests in flight)", error.message, self.in_flight)
        self.flow.fail_all(error)
        self.easel.fail_all(error)
        for callback in self.on_death:
            callback(error.message)

    # --- calls

    async def submit(self, request: GenerateRequest) -> Call:
        """Validate every item, then submit all. The caller iterates the call, and ends it with `cancel()`.

        Raises:
            BadRequest: an item can never be served; nothing has been submitted.
            QueueFull: the server is draining.
            EngineDead: there is no engine.
        """
        self._check_open()
        self.info.check_pooled(any(item.pooled for item in request.items), any(item.audio for item in request.items))
        prompts = await self.admission.prompts(request.items)
        outputs, reader = self._continuations(request, prompts)
        self._check_open()  # again: tokenising may have taken a while
        taken = [output.id for output in outputs if output.id in self.flow.active]
        if taken or len({output.id for output in outputs}) < len(outputs):
            raise BadRequest(f"rid {(taken or [outputs[0].id])[0]!r} is in use by another request", param="rid")
        self.sessions.check_several([output.item.session for output in outputs if output.item.session is not None])
        call = Call(self.flow, outputs, reader, request.background)
        for output in outputs:
            self.flow.add(output)
        try:
            for output in outputs:
                self.connection.send(_submit_message(output, outputs[0].id if len(outputs) > 1 else ""))
        except UnicodeEncodeError:
            call.cancel()
            raise BadRequest("a field holds lone surrogates: it is no valid Unicode") from None
        except BaseException:
            call.cancel()
            raise
        return call

    def abort(self, rid: str = "", everything: bool = False) -> int:
        """End requests by id (that of the request or of one continuation); they finish with reason `abort`."""
        ended, stats = self.flow.abort(rid, everything) + self.easel.abort(rid, everything), self.connection.stats
        # The engine tells once a second; who aborts and waits for idleness is not to wait for that.
        stats.running = min(stats.running, self.in_flight)
        stats.waiting = min(stats.waiting, self.in_flight - stats.running)
        return ended

    def picture_facts(self) -> dict[str, Any]:
        """What the engine says of a model that draws: the fields of `diffusion.request.Facts`.

        Raises:
            QueueFull: the server is draining.
            EngineDead: there is no engine, or it has not begun.
        """
        self._check_open()
        if self.connection.ready is None:
            raise EngineDead("the engine is starting, ask again when it serves")
        return self.connection.ready["pictures"]

    def draw(self, draws: list[Draw]) -> Painting:
        """Ask for pictures. The caller iterates what is given, and ends it with `cancel()`.

        Raises:
            BadRequest: the model does not draw.
            QueueFull: the server is draining.
            EngineDead: there is no engine.
        """
        self._check_open()
        self.info.check_draws()
        return self.easel.begin(draws)

    @property
    def adapters(self) -> dict[str, str]:
        """Path by name, as the engine said last; none where none are served."""
        return (self.connection.ready or {}).get("lora_adapters") or {}

    async def load_adapter(
        self, name: str, path: str, pinned: bool = False, sent: dict[str, Any] | None = None
    ) -> ControlReply:
        """Load an adapter, or a new version of one. `sent`: fields of `core.adapters.Sent`, of one without a folder; or
        its `config`, and in `broadcast` what `core.updates.Keeper.receive` takes.

        Raises:
            EngineDead: there is no engine.
        """
        values = {"name": name, "path": path, "pinned": pinned, **({} if sent is None else {"sent": sent})}
        return self._told(await self.connection.control("load_lora_adapter", LOAD_SECONDS, values))

    async def unload_adapter(self, name: str) -> ControlReply:
        """Forget an adapter; requests that have begun with it end with it. Raises EngineDead."""
        return self._told(await self.connection.control("unload_lora_adapter", LOAD_SECONDS, {"name": name}))

    async def set_lora(self, **args: Any) -> ControlReply:
        """What pictures wear that ask for nothing (`diffusion/worn.py:Wardrobe.use`). Raises EngineDead."""
        return self._told(await self.connection.control("set_lora", LOAD_SECONDS, args))

    def _told(self, reply: ControlReply) -> ControlReply:
        if reply.ok and self.connection.ready is not None:
            self.connection.ready["lora_adapters"] = reply.data["loaded"]
        return reply

    async def control(self, name: str, /, deadline: float | None = 60.0, **args: Any) -> ControlReply:
        """An administrative call (names in `core/messages.py:Control`).

        Raises:
            EngineDead: there is no engine, or it gave no answer within `deadline` seconds.
        """
        return await self.connection.control(name, deadline, args)

    def _continuations(self, request: GenerateRequest, prompts: list[Prompt]) -> tuple[list[Continuation], Reader]:
        now = time.monotonic()
        reader = Reader(sum(item.sampling.n for item in request.items), request.stream)
        outputs: list[Continuation] = []
        for index, (item, prompt) in enumerate(zip(request.items, prompts, strict=True)):
            params = self.admission.params(item, prompt)
            for choice in range(params.n):
                output = Continuation(
                    id=item.id if params.n == 1 else f"{item.id}-{choice}",
                    item=item,
                    index=index,
                    choice=choice,
                    prompt_ids=prompt.ids,
                    media=prompt.media,
                    params=_params_of_choice(params, choice),
                    arrival=now,
                    consumer=reader,
                    whole=not (request.stream or params.stop or params.stop_regex),
                    trace=CURRENT.get(),
                )
                if self.tokenizer is not None and not item.pooled:
                    output.decoder = StreamDecoder(self.tokenizer, params)
                outputs.append(output)
        return outputs, reader

    def _check_open(self) -> None:
        if self.draining:
            raise QueueFull("the server is shutting down and takes no new requests", code="draining")
        if self.dead is not None:
            raise EngineDead(self.dead)


def _params_of_choice(params: SamplingParams, choice: int) -> SamplingParams:
    """What the engine sees: one continuation, no stop strings, a seed of its own."""
    seed = params.sampling_seed
    if seed is not None:
        seed = (seed + choice * _SEED_STEP) & _SEED_MASK
    return msgspec.structs.replace(params, n=1, stop=[], stop_regex=[], sampling_seed=seed)


def _submit_message(output: Continuation, call: str) -> Submit:
    item = output.item
    return Submit(
        id=output.id,
        input_ids=pack_ids(with_content(output.prompt_ids, output.media) if output.media else output.prompt_ids),
        media=output.media,
        sampling=output.params,
        priority=item.priority,
        namespace=item.namespace,
        adapter=item.adapter,
        return_logprob=item.return_logprob,
        logprob_start=item.logprob_start if item.return_logprob else -1,
        top_logprobs=item.top_logprobs,
        token_ids_logprob=item.token_ids_logprob,
        return_hidden=item.return_hidden,
        return_routed=item.return_routed,
        pooled=item.pooled,
        second=item.second,
        audio=item.audio,
        align=item.align,
        arrival=time.time(),
        grammar_at_once=not item.reasons,
        dp_rank=-1 if item.dp_rank is None else item.dp_rank,
        room=f"{item.room}/{output.choice}" if item.room >= 0 else "",
        prefill_host=item.prefill[0],
        prefill_port=item.prefill[1],
        call=call,
    )
