"""Encoder servers: the engine of one, in the place of the scheduler on its runner; and who asks such servers."""

from __future__ import annotations

from collections import deque
from time import monotonic
from typing import TYPE_CHECKING, Any, NamedTuple

from phloem.core.errors import BadRequest, ConfigError
from phloem.core.late import Prepared
from phloem.core.messages import (
    Abort,
    Control,
    ControlReply,
    Drain,
    FromEngine,
    Heartbeat,
    Stats,
    Stopped,
    ToEngine,
)
from phloem.core.ranges import parse_bytes
from phloem.core.resolve import Decision
from phloem.disagg.embeddings import AGAIN, ITEMSIZE, MISFIT, Made, Misfit, encode, read_look
from phloem.disagg.encoders import NAME, Encoders, Wanted, addresses
from phloem.engine.towers.encoding import Embedding, build_encoder, facts_of
from phloem.launch.starting import Starting
from phloem.models._vision import VisionTower
from phloem.utils import log

if TYPE_CHECKING:
    from collections.abc import Callable

    from phloem.checkpoint.describe import Checkpoint
    from phloem.core.config import Config
    from phloem.core.media import Media
    from phloem.core.messages import Submit
    from phloem.engine.worker import Built

    Prepare = Callable[[Submit, Any], Prepared | None]

_log = log.get("launch")

BEAT = 1.0  # seconds
TOGETHER = 8192  # tokens in one pass of the tower: more bring little, and others wait meanwhile


def check(config: Config, checkpoint: Checkpoint) -> None:
    """Raises ConfigError for settings that contradict each other, or a model that has no towers."""
    chosen, runtime = config.disagg, config.runtime
    if checkpoint.pictures is not None and (chosen.encoder_only or chosen.language_only):
        raise ConfigError("encoder_only and language_only: a model that draws is one thing", param="encoder_only")
    if chosen.encoder_only and (chosen.language_only or chosen.encoder_urls):
        raise ConfigError("encoder_only: a server has towers alone, or none (language_only)", param="encoder_only")
    if chosen.language_only and not chosen.encoder_urls:
        raise ConfigError(f"language_only: {NAME} says which servers encode media", param=NAME)
    if chosen.encoder_urls and not chosen.language_only:
        raise ConfigError(f"{NAME}: media are encoded here; with language_only they are elsewhere", param=NAME)
    if chosen.encoder_urls:
        addresses(chosen.encoder_urls)
    if chosen.language_only and config.speculative.enable_spec_capture:
        raise ConfigError("language_only: states are captured where the tower is (enable_spec_capture)")
    if not chosen.encoder_only:
        return
    sizes = {name: vars(runtime)[name] for name in ("tp_size", "pp_size", "ep_size", "dp_size", "attn_dp_size")}
    for name, size in {**sizes, "nnodes": config.nodes.nnodes}.items():
        if size > 1:
            raise ConfigError(f"{name}: a tower runs on one rank: start several encoder servers", param=name)
    if chosen.disaggregation_mode != "null":
        raise ConfigError(f"encoder_only: a server of disaggregation_mode {chosen.disaggregation_mode} has the model")
    if config.lora.enable_lora or config.lora.lora_paths:
        raise ConfigError("encoder_only: adapters are of the language model", param="enable_lora")


class _Waiting(NamedTuple):
    id: str
    item: Media


class EncoderCore:
    """The engine of an encoder server. Built and run by one thread; `send` is called from that thread alone.

    Raises:
        ConfigError: a setting cannot be served.
        ModelLoadError: the model has no tower.
    """

    def __init__(self, config: Config, checkpoint: Checkpoint, send: Callable[[FromEngine], None]) -> None:
        starting = Starting(send)
        built = build_encoder(config, checkpoint, starting.end)
        self._encoder, self._facts, self._send = built.encoder, built.facts, send
        self._most = config.schedule.max_queued_requests
        self._waiting: deque[_Waiting] = deque()
        self._steps = 0
        self._stopping: float | None = None  # when to stop at the latest
        self._beaten = self._counted = 0.0
        self._dirty = False  # something was done since the last statistics
        decisions = [*built.decisions, Decision("encoder_only", True, "the language model is elsewhere")]
        self.info: dict[str, Any] = {
            **built.info,
            "encoder": built.facts,
            "max_running_requests": self._most,
            "decisions": [[d.name, d.value, d.reason] for d in decisions],
            "phases": starting.seconds,
            "lora_adapters": None,
        }

    def run(self, poll: Callable[[float | None], list[ToEngine]], rest: Callable[[], None] | None = None) -> None:
        """Encode until told to drain, or until the door has gone."""
        self._encoder.begin()
        while True:
            try:
                messages = poll(0 if self._waiting else BEAT)
            except EOFError:
                return
            for message in messages:
                self._take(message)
            self._report()
            if self._stopping is not None and (not self._waiting or monotonic() >= self._stopping):
                self._refuse_all("the server is shutting down")
                self._send(Stopped())
                return
            self._step()

    def close(self) -> None:
        self._waiting.clear()

    def _take(self, message: ToEngine) -> None:
        if isinstance(message, Control) and message.name == "encode":
            self._ask(message)
        elif isinstance(message, Control):
            self._control(message)
        elif isinstance(message, Drain):
            self._stopping = monotonic() + message.timeout
        elif isinstance(message, Abort) and message.all:
            self._refuse_all("the administrator has ended it")

    def _ask(self, call: Control) -> None:
        if self._stopping is not None:
            self._refuse(call.id, "the server is shutting down", AGAIN)
            return
        if len(self._waiting) >= self._most:
            self._refuse(call.id, f"{self._most} items wait (max_queued_requests)", AGAIN)
            return
        try:
            item = read_look(call.args["ask"], self._facts)
        except Misfit as error:
            self._refuse(call.id, str(error), MISFIT)
        except BadRequest as error:
            self._refuse(call.id, error.message, error.status)
        else:
            self._waiting.append(_Waiting(call.id, item))

    def _control(self, call: Control) -> None:
        if call.name == "state":
            state = {"running": 0, "waiting": len(self._waiting), "encoder_cache_bytes": self._encoder.cache.nbytes}
            self._send(ControlReply(id=call.id, data=state))
        elif call.name == "flush_cache":
            self._encoder.cache.clear()
            self._send(ControlReply(id=call.id))
        elif call.name == "abort_all":
            self._refuse_all("the administrator has ended it")
            self._send(ControlReply(id=call.id))
        else:
            self._send(ControlReply(id=call.id, ok=False, message=f"an encoder server has no {call.name!r}"))

    def _refuse(self, call: str, why: str, status: int) -> None:
        self._send(ControlReply(id=call, ok=False, message=why, data={"status": status}))

    def _refuse_all(self, why: str) -> None:
        while self._waiting:
            self._refuse(self._waiting.popleft().id, why, AGAIN)

    def _step(self) -> None:
        """One pass of the tower, over as many items as are worth it."""
        taken: list[_Waiting] = []
        while self._waiting and (not taken or sum(one.item.count for one in taken) < TOGETHER):
            taken.append(self._waiting.popleft())
        if not taken:
            return
        self._steps, self._dirty = self._steps + 1, True
        made = self._encoder.encode([one.item for one in taken])
        for one, found in zip(taken, made, strict=True):
            if isinstance(found, Embedding):
                told = encode(Made(one.item.digest, found.shape, found.kind, found.data))
                self._send(ControlReply(id=one.id, data={"made": told}))
            else:
                self._refuse(one.id, found.message, found.status)

    def _report(self) -> None:
        now = monotonic()
        if now - self._beaten >= BEAT:
            self._beaten = now
            self._send(Heartbeat(step=self._steps))
        if self._dirty and (not self._waiting or now - self._counted >= BEAT):
            self._counted, self._dirty = now, bool(self._waiting)
            encoder = self._encoder
            self._send(
                Stats(
                    waiting=len(self._waiting),
                    step=self._steps,
                    pictures_encoded=encoder.encoded,
                    pictures_found=encoder.found,
                )
            )


def encoders_of(config: Config, checkpoint: Checkpoint, built: Built) -> Encoders | None:
    """Who is asked for embeddings; None where the tower is here. Raises ConfigError."""
    if not config.disagg.language_only:
        return None
    tower = built.tower
    if not isinstance(tower, VisionTower):
        raise ConfigError("language_only: this model takes no media", param="language_only")
    facts = facts_of(checkpoint, tower)
    if facts["dtype"] not in ITEMSIZE:
        raise ConfigError(f"language_only: embeddings of {facts['dtype']} are not sent", param="dtype")
    wanted = Wanted(facts, tower.hidden_size * tower.parts)
    budget = parse_bytes(config.media.mm_encoder_cache, "mm_encoder_cache")
    found = Encoders(config.disagg.encoder_urls or [], wanted, budget, config.server.api_key)
    _log.info("media are encoded by %s", ", ".join(one.url for one in found.all))
    return found


def seeing(encoders: Encoders | None, prepare: Prepare) -> Prepare:
    """`prepare`, and what encoder servers are waited for."""
    if encoders is None:
        return prepare

    def prepared(submit: Submit, prompt: Any) -> Prepared | None:
        found = prepare(submit, prompt)
        late = encoders.expect(submit) if submit.media else None
        if late is None:
            return found
        return Prepared((late,)) if found is None else Prepared((*found.waits, late), found.constraint)

    return prepared
