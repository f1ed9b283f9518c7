"""Several engines behind one door (data parallelism): a link made of links, so that the door knows but one.

Requests go to one engine each (`scheduler/data_parallel.py`), administration to all. One that ends takes its own
requests with it and is started again, while the others serve on. Weights that were changed since the start are not with
an engine that starts: then all of them end, as the engine of a door that has but one would.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from phloem.core.errors import BadRequest, ConfigError, EngineDead
from phloem.core.messages import (
    Abort,
    Control,
    ControlReply,
    Drain,
    Draw,
    EngineLink,
    Failed,
    FromEngine,
    Heartbeat,
    Lost,
    Painted,
    Progress,
    Ready,
    Replica,
    Reweighted,
    Stats,
    Stopped,
    Submit,
    ToEngine,
    Tokens,
)
from phloem.launch.process import EngineProcess
from phloem.launch.together import Asked, summed
from phloem.scheduler.data_parallel import WHY, Balancer
from phloem.utils import log

if TYPE_CHECKING:
    from phloem.core.config import Config

_log = log.get("launch")

Start = Callable[[int], EngineLink]  # by the engine's number
Take = Callable[[FromEngine], bool]

RESTART_WINDOW = 600.0  # seconds in which `max_engine_restarts` are counted, of each engine
LOOK = 0.25  # seconds between looks at engines that may have ended, or hang
LAST_WORDS = 0.5  # seconds that a dead engine's reason may still be on its way


@dataclass(eq=False)
class _Engine:
    """One of them."""

    rank: int
    link: EngineLink
    stats: Stats = field(default_factory=Stats)
    ready: dict[str, Any] | None = None
    rows: list[str] = field(default_factory=list[str])  # of its last `Tokens` that had some
    heard: float = 0.0
    busy: float = 0.0  # seconds of its step, when it said so
    dead_since: float = 0.0  # that its link is not alive; 0: it is
    why: str = ""  # it was ended, or what it said of its end
    gone: bool = False  # it does not come again
    stopped: bool = False
    restarts: list[float] = field(default_factory=list[float])

    def begin(self, link: EngineLink) -> None:
        """Another one in its place."""
        self.link, self.stats, self.ready, self.rows, self.busy = link, Stats(), None, [], 0.0
        self.heard, self.dead_since, self.why = time.monotonic(), 0.0, ""


def refuse(config: Config) -> None:
    """Raises ConfigError for what several engines behind one door do not do."""
    if config.runtime.dp_size > 1 and config.cache.kv_events_config is not None:
        why = "each replica would publish under the same address; use `phloem router` before several servers"
        raise ConfigError(f"dp_size {config.runtime.dp_size}: kv_events_config: {why}", param="kv_events_config")


def engine_of(config: Config) -> EngineLink:
    """An engine in a process of its own, or several behind one link. Raises ConfigError, as `refuse`."""
    if config.runtime.dp_size == 1:
        return EngineProcess(config)
    return Replicas(config, lambda rank: EngineProcess(placed(config, rank)))


def placed(config: Config, rank: int) -> Config:
    """What a replica is told: where devices have numbers, its ranks' follow those of the replica before."""
    runtime = config.runtime
    ahead = rank * runtime.pp_size * runtime.tp_size * runtime.gpu_id_step
    return config.with_(base_gpu_id=(runtime.base_gpu_id or 0) + ahead)


class Replicas(EngineLink):
    """A link to `dp_size` engines, which `start` makes. `deliver` runs in the door's event loop, as `send` does."""

    def __init__(self, config: Config, start: Start) -> None:
        refuse(config)
        self._config, self._start = config, start
        runtime = config.runtime
        self._balancer = Balancer(runtime.dp_size, runtime.load_balance_method)
        self._asked: dict[str, Asked] = {}
        self._after: dict[str, Control] = {}  # what an engine that is started again is told at once
        self._told_by: _Engine | None = None  # whose rows the door has
        self._ready = self._over = self._changed = False
        self._take: Take = lambda _: False
        self._end: asyncio.Future[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._engines: list[_Engine] = []
        try:
            for rank in range(runtime.dp_size):
                self._engines.append(_Engine(rank, start(rank), heard=time.monotonic()))
        except BaseException:
            self.close()
            raise

    # --- the face of a link

    @property
    def alive(self) -> bool:
        return not self._over

    @property
    def replicas(self) -> list[Replica]:
        return [
            Replica(
                rank=one.rank,
                stats=one.stats,
                ready=one.ready,
                in_flight=self._balancer.requests(one.rank),
                problem=None if one.ready is not None else one.why or "the engine is starting",
            )
            for one in self._engines
        ]

    def send(self, message: ToEngine) -> None:
        match message:
            case Submit():
                self._send_to(
                    self._engine_for(message, message.input_ids, message.namespace + message.adapter), message
                )
            case Draw():
                self._send_to(self._engine_for(message, b"", ""), message)
            case Abort():
                self._abort(message)
            case Control():
                self._control(message)
            case Drain():
                # An engine in this process is ended from any thread.
                if self._loop is None:
                    self._drain(message)
                else:
                    self._loop.call_soon_threadsafe(self._drain, message)

    async def deliver(self, take: Take) -> None:
        self._loop = asyncio.get_running_loop()
        self._take, self._end = take, self._loop.create_future()
        tasks = [asyncio.create_task(self._hear(one)) for one in self._engines]
        tasks.append(asyncio.create_task(self._mind()))
        for task in tasks:
            task.add_done_callback(self._broke)
        try:
            await self._end
        finally:
            self.close()  # where one cannot go on, nobody waits for what the others do
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def close(self) -> None:
        self._over = True
        for one in self._engines:
            one.gone = True
            one.link.close()

    # --- to the engines

    def _engine_for(self, message: Submit | Draw, ids: bytes, namespace: str) -> _Engine:
        """Raises EngineDead when no engine, or not the one that is asked for, can take it."""
        forced = message.dp_rank if isinstance(message, Submit) else -1
        if forced >= 0:
            one = self._engines[forced]
            if self._ready and one.ready is None:
                raise EngineDead(f"data parallel rank {forced} does not serve now: {one.why or 'it is starting'}")
            self._balancer.give(message.id, ids, namespace, forced)
            return one
        serving = [one.rank for one in self._engines if one.ready is not None]
        if not serving and self._ready:
            raise EngineDead("all engines behind this door are starting again")
        rank = self._balancer.choose(message.id, ids, namespace, serving or range(len(self._engines)))
        return self._engines[rank]

    def _send_to(self, one: _Engine, message: ToEngine, *, quietly: bool = False) -> None:
        try:
            one.link.send(message)
        except EngineDead as error:
            if isinstance(message, Submit | Draw):
                self._balancer.ended(message.id)
            if not quietly:
                raise EngineDead(f"data parallel rank {one.rank}: {error.message}") from None

    def _abort(self, message: Abort) -> None:
        rank = None if message.all else self._balancer.of(message.id)
        for one in self._engines if message.all else [] if rank is None else [self._engines[rank]]:
            self._send_to(one, message, quietly=True)
        self._balancer.ended(message.id)

    def _drain(self, message: Drain) -> None:
        for one in self._engines:
            one.gone = True
            if one.ready is not None or not self._ready:
                self._send_to(one, message, quietly=True)

    def _control(self, message: Control) -> None:
        """To all. What changes weights needs all of them; the rest is answered by those that serve."""
        serving = [one for one in self._engines if one.ready is not None]
        asked = Asked(message, {one.rank for one in serving})
        text = self._unready(message, asked.of_weights)
        if text:
            asyncio.get_running_loop().call_soon(self._give, ControlReply(id=message.id, ok=False, message=text))
            return
        self._asked[message.id] = asked
        for one in serving:
            try:
                one.link.send(asked.for_rank(one.rank))
            except EngineDead as error:
                self._replied(one, ControlReply(id=message.id, ok=False, message=error.message))
            except TypeError:
                self._asked.pop(message.id, None)
                what = f"{message.name}: what lies in this process does not reach data parallel ranks"
                raise BadRequest(f"{what}: use a file, or the HTTP door", code="not_supported") from None

    def _unready(self, message: Control, of_weights: bool) -> str:
        """Why no engine is asked; "": all that serve are. An engine alone would refuse to sleep, the others not."""
        missing = [one for one in self._engines if one.ready is None]
        if missing and (of_weights or len(missing) == len(self._engines)):
            return f"data parallel rank {missing[0].rank} does not serve now: {missing[0].why or 'starting'}"
        if message.name != "release_memory" or self._held_back():
            return ""
        for one in self._engines:
            if count := self._balancer.requests(one.rank):
                what = "request is running" if count == 1 else "requests are running"
                return (
                    f"data parallel rank {one.rank}: {count} {what}: pause_generation first, with mode abort or retract"
                )
        return ""

    def _held_back(self) -> bool:
        """Whether generation is paused so that requests, if there are any, hold no memory."""
        pause = self._after.get("pause")
        return pause is not None and pause.args.get("mode") != "in_place"

    # --- from the engines

    async def _hear(self, one: _Engine) -> None:
        """One engine after another in its place, until the last of them ends."""
        while not self._over:
            try:
                await one.link.deliver(lambda message: self._on(one, message))
                why = one.why
            except EngineDead as error:
                why = one.why or error.message
            except Exception as error:
                _log.exception("data parallel rank %d: the link broke", one.rank)
                why = f"the link broke: {type(error).__name__}: {error}"
            if one.stopped or self._over:
                return
            if not self._again(one, why or "the engine has ended"):
                return

    def _again(self, one: _Engine, why: str) -> bool:
        """An engine has ended. Whether another one was started; otherwise all are over."""
        server, now = self._config.server, time.monotonic()
        one.restarts = [at for at in one.restarts if now - at < RESTART_WINDOW]
        one.ready, one.stats, one.why = None, Stats(), why
        whole = f"data parallel rank {one.rank} of {len(self._engines)} has gone: {why}"
        lost = self._balancer.lost(one.rank)
        for asked in list(self._asked.values()):
            self._replied(one, ControlReply(id=asked.control.id, ok=False, message=whole))
        one.link.close()
        if not self._ready or self._changed or one.gone or server.on_engine_death == "exit":
            self._finish(EngineDead(whole))
            return False
        if len(one.restarts) >= server.max_engine_restarts:
            self._finish(EngineDead(f"{whole}; {len(one.restarts)} were started in its place within ten minutes"))
            return False
        _log.error("%s (%d requests in flight); the others serve on", whole, len(lost))
        self._give(Lost(ids=lost, error=whole))
        for key in lost:
            self._give(Painted(id=key, done=True, error=whole, status=503))
        one.restarts.append(now)
        try:
            one.begin(self._start(one.rank))
        except Exception as error:
            self._finish(EngineDead(f"{whole}; none could be started in its place: {type(error).__name__}: {error}"))
            return False
        one.why = f"it starts again: {why}"
        self._give(summed([other.stats for other in self._engines], Stats()))
        return True

    def _on(self, one: _Engine, message: FromEngine) -> bool:
        now = time.monotonic()
        one.heard = now
        match message:
            case Tokens():
                self._on_tokens(one, message)
            case Stats():
                one.stats = message
                self._give(summed([other.stats for other in self._engines], message))
            case Heartbeat():
                one.busy = message.busy_seconds
                # The door serves as long as one of them does; those that hang are ended here.
                busy = [other.busy and other.busy + now - other.heard for other in self._engines if other.ready]
                self._give(Heartbeat(step=message.step, busy_seconds=min(busy, default=0.0)))
            case ControlReply():
                self._replied(one, message)
            case Ready():
                self._on_ready(one, message)
            case Progress():
                self._give(Progress(phase=f"rank {one.rank}: {message.phase}", seconds=message.seconds))
            case Failed():
                one.why = f"{message.kind or 'error'}: {message.error}"
                if not self._ready:
                    self._give(message)
                return False
            case Stopped():
                one.stopped = True
                if all(other.stopped or other.ready is None for other in self._engines):
                    self._give(message)
                return False
            case Reweighted():
                self._changed = True
                message.dp_rank = one.rank
                self._give(message)
            case Painted():
                if message.done:
                    self._balancer.ended(message.id)
                self._give(message)
            case _:
                self._give(message)
        return not self._over

    def _on_tokens(self, one: _Engine, message: Tokens) -> None:
        if message.rows is not None:
            one.rows, self._told_by = message.rows, one
        elif message.plain and self._told_by is not one:
            message.rows, self._told_by = one.rows, one  # the door has those of another engine
        self._balancer.stepped(one.rank)
        for chunk in message.chunks:
            chunk.dp_rank = one.rank
            if chunk.finish is not None:
                self._balancer.ended(chunk.id)
            else:
                self._balancer.began(chunk.id)
        self._give(message)

    def _on_ready(self, one: _Engine, message: Ready) -> None:
        one.ready, one.why = message.info, ""
        if self._ready:
            _log.info("data parallel rank %d serves again", one.rank)
            for control in self._after.values():
                self._send_to(one, control, quietly=True)
            return
        if any(other.ready is None for other in self._engines):
            return
        self._ready = True
        first, runtime = self._engines[0].ready or {}, self._config.runtime
        method, size = runtime.load_balance_method, runtime.dp_size
        decisions = [
            *first.get("decisions", []),
            ["dp_size", size, "as asked: so many engines, each with its own cache"],
            ["load_balance_method", method, WHY[method]],
        ]
        self._give(Ready(info={**first, "decisions": decisions, "dp_size": size}))

    def _replied(self, one: _Engine, reply: ControlReply) -> None:
        asked = self._asked.get(reply.id)
        if asked is None or not asked.take(one.rank, reply):
            return  # nobody asked (an engine is told what the others know), or not all have answered
        del self._asked[reply.id]
        answer, control = asked.answer(), asked.control
        if asked.of_weights and asked.differ:
            self._finish(EngineDead(f"{control.name}: the engines disagree ({answer.message}): all of them end"))
            return
        if answer.ok:
            self._remember(control)
        self._give(answer)

    def _remember(self, control: Control) -> None:
        """What an engine that comes later must be told."""
        name, adapter = control.name, f"adapter {control.args.get('name')}"
        if name == "flush_cache":
            for one in self._engines:
                self._balancer.forget(one.rank)
        elif name in ("release_memory", "begin_update", "init_group"):
            self._changed = True
        elif name == "pause":
            self._after["pause"] = control
        elif name == "resume":
            self._after.pop("pause", None)
        elif name == "load_lora_adapter":
            self._after[adapter] = control
        elif name == "unload_lora_adapter":
            self._after.pop(adapter, None)

    def _give(self, message: FromEngine) -> None:
        if not self._over and not self._take(message):
            self._finish(None)

    def _finish(self, error: EngineDead | None) -> None:
        """Of all: `deliver` returns, or raises this."""
        if self._end is not None and not self._end.done():
            if error is None:
                self._end.set_result(None)
            else:
                self._end.set_exception(error)
        self._over = True

    def _broke(self, task: asyncio.Task[None]) -> None:
        """What is done for an engine has failed: nobody would hear it any more."""
        error = None if task.cancelled() else task.exception()
        if error is not None:
            _log.error("the engines' door broke", exc_info=error)
            self._finish(EngineDead(f"the door of the engines broke: {type(error).__name__}: {error}"))

    async def _mind(self) -> None:
        """End engines that hang, and let go of those whose links have died without a word."""
        limit = self._config.server.engine_hang_timeout
        looked = time.monotonic()
        while True:
            await asyncio.sleep(LOOK)
            now = time.monotonic()
            slept, looked = now - looked > LOOK + max(1.0, limit / 2), now
            for one in self._engines:
                if slept:
                    one.heard, one.busy = now, 0.0  # this process slept too: they may be about to speak
                hung = now - one.heard + one.busy
                if one.gone or one.stopped:
                    continue
                if not one.link.alive:
                    one.dead_since = one.dead_since or now
                    if now - one.dead_since > LAST_WORDS:
                        one.why = one.why or one.link.end
                        one.link.close()
                elif one.ready is not None and 0 < limit < hung:
                    _log.error("data parallel rank %d has been hanging for %.0f s: it is ended", one.rank, hung)
                    one.why = f"the engine hung for {hung:.0f} s and was ended"
                    one.link.close()
