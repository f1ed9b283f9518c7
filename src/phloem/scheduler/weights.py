"""Calls that change weights or give memory back, one after another: they wait here for what is read beside the steps.

New weights are put in place with no step in flight: what was launched before is taken in first, and told, so that every
token is known to be of the weights before or behind the change.
"""

from __future__ import annotations

import logging
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from phloem.core.errors import BadRequest, PhloemError
from phloem.core.messages import Reweighted
from phloem.core.request import FinishReason
from phloem.core.updates import SOURCES, TAGS

if TYPE_CHECKING:
    from collections.abc import Callable

    from phloem.core.adapters import Lender
    from phloem.core.batch import Pending
    from phloem.core.messages import FromEngine
    from phloem.core.updates import Keeper
    from phloem.kvcache.manager import CacheManager
    from phloem.scheduler.state import Slots

log = logging.getLogger(__name__)

T = TypeVar("T")
Told = tuple[str, dict[str, Any]]  # a reply's message and data
ABORTED = FinishReason("abort", message="aborted: the weights change")


class Governed(Protocol):
    """What the calls act on: the scheduler."""

    cache: CacheManager
    slots: Slots
    lender: Lender | None
    keeper: Keeper | None
    send: Callable[[FromEngine], None]

    @property
    def weight_version(self) -> str: ...
    @weight_version.setter
    def weight_version(self, version: str) -> None: ...
    @property
    def nothing_held(self) -> bool: ...
    def abort_all(self, reason: FinishReason) -> int: ...
    def settle(self) -> None: ...
    def between(self, work: Callable[[], Any]) -> Pending[Any]: ...


@dataclass(slots=True)
class _Call:
    id: str
    start: Callable[[], Pending[Any]]
    finish: Callable[[Any], Told]
    pending: Pending[Any] | None = None


class WeightCalls:
    """Answers by `reply(id, ok, message, data)`."""

    def __init__(self, scheduler: Governed, reply: Callable[[str, bool, str, dict[str, Any]], None]) -> None:
        self.scheduler = scheduler
        self._reply = reply
        self._calls: deque[_Call] = deque()
        self._joining: list[tuple[str, Pending[None]]] = []
        self._snapshot: dict[str, str] = {}

    @property
    def waiting(self) -> bool:
        return bool(self._calls or self._joining)

    def poll(self) -> None:
        joining, self._joining = self._joining, []
        for call_id, pending in joining:
            if pending.done():
                self._told(call_id, lambda pending=pending: (pending.result(), ("the group is complete", {}))[1])
            else:
                self._joining.append((call_id, pending))
        while self._calls and self._advance(self._calls[0]):
            self._calls.popleft()

    def _advance(self, call: _Call) -> bool:
        """Whether the call has been answered."""
        if call.pending is None:
            try:
                call.pending = call.start()
            except Exception as error:
                self._failed(call.id, error)
                return True
        if not call.pending.done():
            return False
        pending = call.pending
        self._told(call.id, lambda: call.finish(pending.result()))
        return True

    def give_up(self) -> None:
        """The engine stops: whoever still waits gets an answer."""
        waiting = [call.id for call in self._calls] + [call_id for call_id, _ in self._joining]
        self._calls.clear()
        self._joining = []
        for call_id in waiting:
            self._reply(call_id, False, "not done: the engine stops", {})

    # calls

    def _do_update_weights(self, call_id: str, args: dict[str, Any]) -> None:
        """New weights from one of `SOURCES`; see `core.updates.Keeper.read`."""
        keeper, source = self._keeper(), str(args.get("source"))
        if source not in SOURCES:
            raise BadRequest(f"unknown source {source!r}; known: {', '.join(SOURCES)}")

        def finish(count: int) -> Told:
            if keeper.collecting:
                return f"{count} tensors are collected until the update ends", {"tensors": count}
            return self._install(count, args)

        self._queue(call_id, lambda: keeper.read(source, args), finish)

    def _do_begin_update(self, call_id: str, args: dict[str, Any]) -> None:
        def finish(_: None) -> Told:
            return "what comes is collected until the update ends", {}

        keeper = self._keeper()
        self._queue(call_id, lambda: _Now(keeper.begin()), finish)

    def _do_end_update(self, call_id: str, args: dict[str, Any]) -> None:
        self._queue(call_id, self._keeper().end, lambda count: self._install(count, args))

    def _do_abort_update(self, call_id: str, args: dict[str, Any]) -> None:
        keeper = self._keeper()

        def finish(count: int) -> Told:
            return f"{count} tensors are forgotten: the weights are what they were", {"tensors": count}

        self._queue(call_id, lambda: _Now(keeper.drop()), finish)

    def _do_update_version(self, call_id: str, args: dict[str, Any]) -> None:
        keeper, version = self._keeper(), str(args["version"])

        def finish(_: None) -> Told:
            aborted = self._abort(args)
            self.scheduler.settle()
            keeper.version = version
            self._tell()
            return f"the weights are called {version}", {"version": version, "aborted": aborted}

        self._queue(call_id, lambda: _Now(None), finish)

    def _do_init_group(self, call_id: str, args: dict[str, Any]) -> None:
        self._joining.append((call_id, self._keeper().join(args)))

    def _do_destroy_group(self, call_id: str, args: dict[str, Any]) -> None:
        keeper, name = self._keeper(), str(args["name"])
        self._queue(call_id, lambda: _Now(keeper.leave(name)), lambda _: (f"group {name} is destroyed", {}))

    def _do_check_weights(self, call_id: str, args: dict[str, Any]) -> None:
        keeper, action, skip = self._keeper(), str(args.get("action")), list(args.get("skip") or [])
        if action == "reset":
            random = {**args, "source": "random", "version": None, "flush": True, "abort_all": False}
            self._do_update_weights(call_id, random)
            return
        if action not in ("checksum", "snapshot", "compare"):
            raise BadRequest(
                f"unknown action {action!r:.100}; known: checksum, snapshot, reset, compare", param="action"
            )

        def finish(found: dict[str, str]) -> Told:
            if action == "snapshot":
                self._snapshot = found
                return f"{len(found)} tensors are remembered", {}
            if action == "compare":
                if not self._snapshot:
                    raise BadRequest("there is no snapshot to compare with", param="action")
                other = [name for name, digest in found.items() if self._snapshot.get(name, digest) != digest]
                if other:
                    raise BadRequest(f"{len(other)} tensors are not those of the snapshot: {', '.join(other[:8])}")
                return "all tensors are those of the snapshot", {}
            return f"{len(found)} tensors", {"checksums": found}

        self._queue(call_id, lambda: self.scheduler.between(lambda: keeper.digests(skip)), finish)

    def _do_release_memory(self, call_id: str, args: dict[str, Any]) -> None:
        keeper, tags = self._keeper(), _tags(args)
        self._queue(call_id, lambda: self._release(keeper, tags), lambda done: (f"{done} bytes", {"bytes": done}))

    def _release(self, keeper: Keeper, tags: frozenset[str]) -> Pending[int]:
        scheduler = self.scheduler
        scheduler.settle()
        if not scheduler.nothing_held:
            count = scheduler.slots.num_running
            raise BadRequest(f"{count} requests are running: pause_generation first, with mode abort or retract")
        if tags & {"weights", "kv_cache"}:
            scheduler.cache.reset()  # what is cached is lost, or of weights that need not come back
        return scheduler.between(lambda: keeper.release(tags))

    def _do_resume_memory(self, call_id: str, args: dict[str, Any]) -> None:
        keeper, tags = self._keeper(), _tags(args)

        def finish(_: None) -> Told:
            self._tell()
            if keeper.unfit:
                self._fail_all(keeper.unfit)
            still = f", {', '.join(sorted(keeper.asleep))} still asleep" if keeper.asleep else ""
            return (keeper.unfit or f"awake{still}"), {"unfit": keeper.unfit}

        self._queue(call_id, lambda: self.scheduler.between(lambda: keeper.resume(tags)), finish)

    # parts of them

    def _install(self, count: int, args: dict[str, Any]) -> Told:
        scheduler, keeper = self.scheduler, self._keeper()
        aborted = self._abort(args)
        scheduler.settle()
        error: Exception | None = None
        try:
            scheduler.between(keeper.put).result()
        except Exception as raised:
            log.exception("new weights could not be put in place")
            error = raised
        keeper.changed(args.get("version"), error)
        if scheduler.lender is not None:
            scheduler.lender.rebase()
        scheduler.weight_version = str(keeper.epoch)
        if args.get("flush") and scheduler.nothing_held:
            scheduler.cache.reset()  # for its memory alone: nothing of it is found any more
        self._tell()
        if error is not None:
            self._fail_all(keeper.unfit)
            raise BadRequest(keeper.unfit)
        log.info("%d tensors are new: version %s", count, keeper.version)
        data = {"tensors": count, "version": keeper.version, "epoch": keeper.epoch, "aborted": aborted}
        return f"{count} tensors are new", data

    def _abort(self, args: dict[str, Any]) -> int:
        if not args.get("abort_all"):
            return 0
        count = self.scheduler.abort_all(ABORTED)
        if count:
            log.warning("%d requests are aborted as an update asked for it (abort_all_requests)", count)
        return count

    def _fail_all(self, why: str) -> None:
        self.scheduler.abort_all(FinishReason("abort", message=why, status_code=503))

    def _tell(self) -> None:
        """Of which weights every token is that comes behind this."""
        keeper = self._keeper()
        self.scheduler.send(Reweighted(version=keeper.version, unfit=keeper.unfit))

    def _queue(self, call_id: str, start: Callable[[], Pending[Any]], finish: Callable[[Any], Told]) -> None:
        self._calls.append(_Call(call_id, start, finish))
        self.poll()

    def _keeper(self) -> Keeper:
        if self.scheduler.keeper is None:
            only = "models that generate, by Phloem's own code, on one rank"
            raise BadRequest(f"weights change only in {only}")
        return self.scheduler.keeper

    def _told(self, call_id: str, work: Callable[[], Told]) -> None:
        try:
            self._reply(call_id, True, *work())
        except Exception as error:
            self._failed(call_id, error)

    def _failed(self, call_id: str, error: Exception) -> None:
        if isinstance(error, PhloemError):
            self._reply(call_id, False, error.message, {})
            return
        log.error("a call that changes weights failed", exc_info=error)
        self._reply(call_id, False, f"{type(error).__name__}: {error}", {})


class _Now(Generic[T]):
    """What has been done already (`core.batch.Pending`)."""

    def __init__(self, found: T) -> None:
        self._found = found

    def done(self) -> bool:
        return True

    def result(self) -> T:
        return self._found


def _tags(args: dict[str, Any]) -> frozenset[str]:
    tags = frozenset(args.get("tags") or TAGS)
    if unknown := sorted(tags - set(TAGS)):
        raise BadRequest(f"unknown tags {', '.join(unknown)[:200]}; known: {', '.join(TAGS)}", param="tags")
    return tags
