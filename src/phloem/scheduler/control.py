"""Administrative calls: flush_cache, clear_hicache_storage, state, cache_tree, kv_events, pause, resume, abort_all,
adapters, profiles, expert_distribution, capture.

Those that change weights stand in `weights.py`.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Protocol

from phloem.core.adapters import Sent
from phloem.core.errors import BadRequest, PhloemError
from phloem.core.messages import Control, ControlReply
from phloem.core.request import FinishReason
from phloem.kvcache import report
from phloem.kvcache.events import as_map
from phloem.scheduler import weights
from phloem.scheduler.profiling import Profiling

if TYPE_CHECKING:
    from collections.abc import Callable

    from phloem.core.adapters import Lender
    from phloem.core.batch import Pending, Runner
    from phloem.kvcache.events import Feed
    from phloem.scheduler.further import Further
    from phloem.scheduler.metrics import Meter

log = logging.getLogger(__name__)

Told = tuple[str, dict[str, Any]]  # a reply's message and data

PAUSE_MODES = ("abort", "retract", "in_place")
ABORTED = FinishReason("abort", message="aborted by an administrative call")


class Recorder(Protocol):
    """Counts how often experts are chosen."""

    def record(self, action: str, /) -> dict[str, Any]:
        """`start`, `stop` or `dump`, between two steps; gives what there is to tell. Raises BadRequest."""
        ...


class Capturer(Protocol):
    """Writes hidden states of texts for trainers of heads that draft."""

    def capture(self, texts: list[list[int]], asked: list[dict[str, Any]], /) -> list[dict[str, Any]]:
        """Between two steps; gives what was written of each text. Raises BadRequest."""
        ...


class Governed(weights.Governed, Protocol):
    """What the calls act on: the scheduler."""

    runner: Runner
    feed: Feed | None
    meter: Meter
    recorder: Recorder | None
    capturer: Capturer | None
    paused: bool
    duty: Callable[[str], dict[str, Any]] | None
    clock: Callable[[], float]

    @property
    def further(self) -> Further | None: ...
    def state(self) -> dict[str, Any]: ...
    def retract_all(self) -> None: ...
    def flush_results(self) -> None: ...


class Controls:
    """Answers each `Control` by one `ControlReply`; those that must wait for a quiet engine wait here."""

    def __init__(self, scheduler: Governed) -> None:
        self.scheduler = scheduler
        self.weights = weights.WeightCalls(scheduler, self._reply)
        self.profiling = Profiling(scheduler)
        self._flushes: list[tuple[str, float]] = []  # (id, deadline)
        self._works: list[tuple[str, Pending[Any], Callable[[Any], Told]]] = []  # (id, work, result -> reply)

    @property
    def waiting(self) -> bool:
        return bool(self._flushes or self._works or self.weights.waiting)

    def between(self, call_id: str, work: Callable[[], Any], told: Callable[[Any], Told]) -> None:
        """Run `work` between two steps; the call is answered by `told(its result)` once it has ended."""
        self._works.append((call_id, self.scheduler.between(work), told))

    def handle(self, call: Control) -> None:
        """Never raises: what goes wrong is the reply."""
        owner = self if f"_do_{call.name}" in dir(self) else self.weights
        handler = getattr(owner, f"_do_{call.name}", None)
        if handler is None:
            names = [*dir(self), *dir(self.weights)]
            known = sorted(name.removeprefix("_do_") for name in names if name.startswith("_do_"))
            self._reply(call.id, False, f"unknown control call {call.name!r}; known: {', '.join(known)}")
            return
        try:
            handler(call.id, call.args)
        except PhloemError as error:
            self._reply(call.id, False, error.message, {"param": error.param} if error.param else None)
        except Exception as error:
            log.exception("control call %s failed", call.name)
            self._reply(call.id, False, f"{type(error).__name__}: {error}")

    def poll(self) -> None:
        """Flush once nothing holds pages, or give up at the deadline; answer for work that has ended."""
        self.weights.poll()
        self.profiling.poll()
        works, self._works = self._works, []
        for call_id, pending, told in works:
            if pending.done():
                self._answer(call_id, pending, told)
            else:
                self._works.append((call_id, pending, told))
        still: list[tuple[str, float]] = []
        for call_id, deadline in self._flushes:
            if self.scheduler.nothing_held:
                self.scheduler.cache.reset()
                if self.scheduler.further is not None:
                    self.scheduler.further.flush()
                self._reply(call_id, True, "the prefix cache is empty")
            elif self.scheduler.clock() >= deadline:
                count = self.scheduler.slots.num_running
                self._reply(call_id, False, f"not flushed: {count} requests are running")
            else:
                still.append((call_id, deadline))
        self._flushes = still

    def give_up(self) -> None:
        """The engine stops: whoever still waits gets an answer. Work between steps has its turn before."""
        self.profiling.close()
        works, self._works = self._works, []
        for call_id, pending, told in works:
            self._answer(call_id, pending, told)
        self.weights.give_up()
        for call_id, _ in self._flushes:
            self._reply(call_id, False, "not flushed: the engine stops")
        self._flushes = []

    def _do_flush_cache(self, call_id: str, args: dict[str, Any]) -> None:
        timeout = float(args.get("timeout") or 0.0)
        self._flushes.append((call_id, self.scheduler.clock() + timeout))
        self.poll()

    def _do_clear_hicache_storage(self, call_id: str, args: dict[str, Any]) -> None:
        if self.scheduler.further is None:
            raise BadRequest("no store is kept: start with --hicache-storage-backend", code="not_supported")
        work = self.scheduler.further.clear_storage()
        self._works.append((call_id, work, lambda pages: (f"{pages} pages are forgotten", {"pages": pages})))

    def _do_disaggregation_mode(self, call_id: str, args: dict[str, Any]) -> None:
        if self.scheduler.duty is None:
            raise BadRequest("this server shares no prompts: start with --disaggregation-mode", code="not_supported")
        told = self.scheduler.duty(str(args.get("mode")))
        self._reply(call_id, True, f"disaggregation_mode is {told['mode']}", told)

    def _do_state(self, call_id: str, args: dict[str, Any]) -> None:
        self._reply(call_id, True, data=self.scheduler.state())

    def _do_cache_tree(self, call_id: str, args: dict[str, Any]) -> None:
        self._reply(call_id, True, data=report.snapshot(self.scheduler.cache, int(args.get("max_nodes") or 512)))

    def _do_kv_events(self, call_id: str, args: dict[str, Any]) -> None:
        """What a reader of cache events begins with: all messages before `sequence` are in it."""
        cache, feed = self.scheduler.cache, self.scheduler.feed
        if feed is None:
            raise BadRequest("no cache events are published: start with --kv-events-config", code="not_supported")
        events = [as_map(event, cache.page_size) for event in feed.dump()]
        self._reply(call_id, True, data={"sequence": feed.sink.sequence, "events": events})

    def _do_expert_distribution(self, call_id: str, args: dict[str, Any]) -> None:
        recorder, action = self.scheduler.recorder, str(args.get("action") or "")
        if recorder is None:
            need = "start with --expert-distribution-recorder-mode stat, or --enable-eplb"
            raise BadRequest(f"experts are not counted: {need}", code="not_supported")
        self.between(call_id, lambda: recorder.record(action), lambda found: ("", found))

    def _do_capture(self, call_id: str, args: dict[str, Any]) -> None:
        capturer = self.scheduler.capturer
        if capturer is None:
            raise BadRequest("no states are captured: start with --enable-spec-capture", code="not_supported")
        texts, asked = args["texts"], args["asked"]
        self.between(call_id, lambda: capturer.capture(texts, asked), lambda found: ("", {"captured": found}))

    def _do_pause(self, call_id: str, args: dict[str, Any]) -> None:
        mode = str(args.get("mode") or "abort")
        if mode not in PAUSE_MODES:
            self._reply(call_id, False, f"unknown mode {mode!r}; known: {', '.join(PAUSE_MODES)}")
            return
        if mode == "abort":
            self.scheduler.abort_all(ABORTED)
        elif mode == "retract":
            self.scheduler.retract_all()
        self.scheduler.paused = True
        self._reply(call_id, True, f"paused ({mode})")

    def _do_resume(self, call_id: str, args: dict[str, Any]) -> None:
        self.scheduler.paused = False
        self._reply(call_id, True, "resumed")

    def _do_abort_all(self, call_id: str, args: dict[str, Any]) -> None:
        count = self.scheduler.abort_all(ABORTED)
        self._reply(call_id, True, f"{count} requests aborted", {"aborted": count})

    def _do_start_profile(self, call_id: str, args: dict[str, Any]) -> None:
        path = self.profiling.start(args)
        self._reply(call_id, True, f"profiling, into {path}", {"path": path})

    def _do_stop_profile(self, call_id: str, args: dict[str, Any]) -> None:
        writing, path = self.profiling.stop()
        self._works.append((call_id, writing, lambda _: (f"the profile is {path}", {"path": str(path)})))

    def _do_get_weights_by_name(self, call_id: str, args: dict[str, Any]) -> None:
        """Read between two steps: no update of weights is half done then, and no step runs beside it."""
        name, rows = str(args.get("name") or ""), int(args.get("rows") or 0)
        if rows < 1:
            raise BadRequest(f"rows must be above 0, got {rows}", param="rows")
        runner = self.scheduler.runner
        self.between(call_id, lambda: runner.read_weight(name, rows), lambda found: ("", {"weight": found.tolist()}))

    def _do_load_lora_adapter(self, call_id: str, args: dict[str, Any]) -> None:
        """The file is read beside the steps, and placed between two of them."""
        name, path = str(args.get("name") or ""), str(args.get("path") or "")
        sent = None if args.get("sent") is None else self._sent(args["sent"])
        work = self._lender().load(name, path, bool(args.get("pinned")), sent)
        self._works.append((call_id, work, lambda loaded: (f"adapter {name} is loaded", {"loaded": loaded})))

    def _sent(self, fields: dict[str, Any]) -> Sent:
        """`broadcast` is received before anything else is looked at, so that the trainer's group stays in step."""
        announced = fields.get("broadcast")
        if announced is None:
            return Sent(**fields)
        if self.scheduler.keeper is None:
            raise BadRequest("models that run transformers' code, or on several ranks, have no trainers' groups")
        return Sent(fields["config"], coming=self.scheduler.keeper.receive(announced))

    def _do_unload_lora_adapter(self, call_id: str, args: dict[str, Any]) -> None:
        users, loaded = self._lender().unload(str(args.get("name") or ""))
        still = f"; {users} requests that have begun with it end with it" if users else ""
        self._reply(call_id, True, f"unloaded{still}", {"loaded": loaded, "users": users})

    def _lender(self) -> Lender:
        if self.scheduler.lender is None:
            raise BadRequest("adapters are served with --enable-lora")
        return self.scheduler.lender

    def _answer(self, call_id: str, pending: Pending[Any], told: Callable[[Any], Told]) -> None:
        try:
            self._reply(call_id, True, *told(pending.result()))
        except PhloemError as error:
            self._reply(call_id, False, error.message, {"param": error.param} if error.param else None)
        except Exception as error:
            log.exception("what was to run between two steps failed")
            self._reply(call_id, False, f"{type(error).__name__}: {error}")

    def _reply(self, call_id: str, ok: bool, message: str = "", data: dict[str, Any] | None = None) -> None:
        self.scheduler.flush_results()  # what a call ended is told before its reply
        self.scheduler.send(ControlReply(id=call_id, ok=ok, message=message, data=data or {}))
