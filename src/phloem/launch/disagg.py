"""Whether an engine computes prompts for others, or has them computed (`disagg/`). What is wrong is told at start."""

from __future__ import annotations

import json
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

from phloem.checkpoint.fingerprint import fingerprint
from phloem.core.errors import BadRequest, ConfigError, PhloemError
from phloem.core.resolve import Decision
from phloem.disagg.arrivals import Arrivals, Target
from phloem.disagg.bootstrap import Book, Bootstrap, Directory, machine_id
from phloem.disagg.rooms import Rooms, Source
from phloem.disagg.transports import TRANSPORTS, Transport
from phloem.engine.runner import ModelRunner
from phloem.kvcache.tiers._copies import PoolCopies
from phloem.launch.tiers import declines
from phloem.platforms._facts import in_host_memory
from phloem.scheduler.remote import Remote
from phloem.utils import log

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from phloem.checkpoint.describe import Checkpoint
    from phloem.core.config import Config
    from phloem.core.updates import Keeper
    from phloem.disagg.transports import Row
    from phloem.engine.worker import Built
    from phloem.kvcache.pool import KVPool
    from phloem.scheduler.scheduler import Scheduler

_log = log.get("launch")

MODE, BACKEND = "disaggregation_mode", "disaggregation_transfer_backend"
MODES = ("null", "prefill", "decode")
PREFERRED = ("shm", "tcp")
MOST_ROWS = 4 << 30  # bytes of pages that have come and are not in the pool yet


def check(config: Config) -> None:
    """Raises ConfigError for settings that contradict each other, whatever the model."""
    chosen = config.disagg
    if chosen.disaggregation_mode == "null":
        if chosen.disaggregation_transfer_backend is not None:
            raise ConfigError(f"{BACKEND}: needs {MODE} prefill or decode", param=BACKEND)
        return
    _transports(chosen.disaggregation_transfer_backend)
    if config.runtime.dp_size > 1:
        text = f"dp_size: several replicas behind one door cannot be a {chosen.disaggregation_mode} server"
        raise ConfigError(f"{text}: start them one by one, behind a gateway", param="dp_size")
    if config.cache.disable_radix_cache:
        raise ConfigError(f"{MODE}: pages are offered and found by prefixes (disable_radix_cache)", param=MODE)
    if config.cache.enable_hierarchical_cache and chosen.disaggregation_mode == "decode":
        text = f"{MODE}: a decode server has no cache tiers (enable_hierarchical_cache); prefill servers may"
        raise ConfigError(text, param=MODE)


def _transports(backend: str | None) -> list[Transport]:
    """Raises ConfigError: there is none of this name."""
    names = list(PREFERRED)
    if backend not in (None, "auto"):
        try:
            TRANSPORTS.check(backend or "")
        except ConfigError as error:
            raise ConfigError(f"{BACKEND}: {error}", param=BACKEND) from None
        names = [backend or ""]
    return [TRANSPORTS.get(name)() for name in names]


@dataclass(frozen=True)
class Parts:
    """What a part among servers is made of."""

    remote: Remote
    bootstrap: Bootstrap | None = None


class Disaggregation:
    """What runs beside the scheduler. `info`: for gateways."""

    def __init__(self, scheduler: Scheduler, mode: str, make: Callable[[str], Parts]) -> None:
        self._scheduler, self._make, self._tiers = scheduler, make, scheduler.further
        self._parts: Parts | None = None
        self.info: dict[str, Any] = {}
        self._become(mode)
        scheduler.duty = self.change

    def change(self, mode: str) -> dict[str, Any]:
        """Another part from now on, in the scheduler's thread. Raises BadRequest: requests run, or rooms are open."""
        if mode not in MODES:
            raise BadRequest(f"{MODE}: {mode!r:.100} is none of {', '.join(MODES)}", param=MODE)
        before = self.info["mode"]
        if mode == before:
            return self.info
        if mode == "decode" and self._tiers is not None:
            raise BadRequest(f"{MODE}: a decode server has no cache tiers (enable_hierarchical_cache)", param=MODE)
        scheduler = self._scheduler
        if scheduler.live or scheduler.inflight or (scheduler.remote is not None and scheduler.remote.busy):
            text = f"{len(scheduler.live)} requests run" if scheduler.live else "rooms of requests that ended are open"
            raise BadRequest(f"{text}: ask again when all have ended", code="busy")
        self.close()
        try:
            self._become(mode)
        except PhloemError:
            self._become(before)
            raise
        _log.info("%s: %s, after %s", MODE, mode, before)
        return self.info

    def _become(self, mode: str) -> None:
        parts = self._parts = None if mode == "null" else self._make(mode)
        scheduler = self._scheduler
        remote = scheduler.remote = None if parts is None else parts.remote
        scheduler.results.on_end = None if remote is None else remote.ended
        arrivals = None if remote is None else remote.arrivals
        scheduler.further = self._tiers if arrivals is None else arrivals
        bootstrap = None if parts is None else parts.bootstrap
        self.info = {"mode": mode, "bootstrap_port": None if bootstrap is None else bootstrap.port}

    def close(self) -> None:
        parts, self._parts = self._parts, None
        if parts is None:
            return
        if parts.bootstrap is not None:
            parts.bootstrap.close()
        if parts.remote.rooms is not None:
            parts.remote.rooms.close()
        if parts.remote.arrivals is not None:
            parts.remote.arrivals.finish()


def disaggregated(config: Config, checkpoint: Checkpoint, built: Built, scheduler: Scheduler) -> Disaggregation | None:
    """Raises ConfigError: the model's memory cannot be handed over, or the port is taken."""
    chosen = config.disagg
    if chosen.disaggregation_mode == "null":
        return None
    why = declines(config, built, scheduler)
    if why or not isinstance(built.runner, ModelRunner):
        raise ConfigError(f"{MODE}: prompts cannot be computed elsewhere: {why}", param=MODE)
    runner, pool = built.runner, built.runner.pool
    copies, facts = PoolCopies(pool), _facts(checkpoint, config, pool)
    transports = _transports(chosen.disaggregation_transfer_backend)
    built.decisions.append(Decision(BACKEND, ", ".join(one.name for one in transports), "the first that both have"))
    keeper = scheduler.keeper
    weights: Callable[[], str] = lambda: "" if keeper is None else _version(keeper)  # noqa: E731

    def copy(pages: NDArray[np.int32], rows: Sequence[Row]) -> None:
        # Pages that are locked are not written: in host memory they can be read beside a step.
        if in_host_memory(pool.device):
            copies.out(pages, rows)
        else:
            runner.between(lambda: copies.out(pages, rows)).result()

    def make(mode: str) -> Parts:
        if mode == "decode":
            vocab = scheduler.settings.vocab_size
            target = Target(copies.into, copies.page_bytes, facts, weights, scheduler.between, MOST_ROWS, vocab)
            return Parts(Remote(None, Arrivals(scheduler.cache, target, Book(transports))))
        host = config.server.host
        rooms = Rooms(scheduler.cache, Source(copy, copies.page_bytes, facts, weights), transports, host)
        directory = Directory(_topology(config, pool), _own(rooms, config))
        try:
            bootstrap = Bootstrap(host, chosen.disaggregation_bootstrap_port, directory)
        except PhloemError:
            rooms.close()
            raise
        _log.info("prompts are computed for decode servers; the bootstrap server is %s:%d", host, bootstrap.port)
        return Parts(Remote(rooms, None), bootstrap)

    return Disaggregation(scheduler, chosen.disaggregation_mode, make)


def _topology(config: Config, pool: KVPool) -> dict[str, Any]:
    return {
        "attn_tp_size": 1,
        "attn_cp_size": 1,
        "dp_size": 1,
        "pp_size": 1,
        "page_size": pool.page_size,
        "kv_cache_dtype": str(pool.dtype).removeprefix("torch."),
        "follow_bootstrap_room": True,
        "load_balance_method": "follow_bootstrap_room",
    }


def _version(keeper: Keeper) -> str:
    """The same on two servers whose weights have changed as often and are called the same. New weights that nobody has
    named are only those of their own server."""
    return f"{keeper.version} {keeper.epoch} {keeper.nameless}".rstrip()


def _own(rooms: Rooms, config: Config) -> dict[str, Any]:
    tcp = rooms.addresses.get("tcp", "|0").rpartition("|")
    return {
        "rank_ip": tcp[0] or config.server.host,
        "rank_port": int(tcp[2]),
        "phloem": {"machine": machine_id(), "addresses": rooms.addresses},
    }


def _facts(checkpoint: Checkpoint, config: Config, pool: KVPool) -> dict[str, str]:
    """What two servers must have alike for pages of the one to be pages of the other, by names for people."""
    settings = json.dumps(checkpoint.config, sort_keys=True, default=str)
    scales = sorted((layer, kept.k_values, kept.v_values) for layer, kept in pool.scales.items())
    return {
        "model": f"{checkpoint.model_type} {blake2b(settings.encode(), digest_size=8).hexdigest()}",
        "weights": fingerprint(checkpoint),
        "quantization": str(config.model.quantization),
        "kv_cache_dtype": str(pool.dtype).removeprefix("torch."),
        "kv_layout": blake2b(repr((pool.memory, scales)).encode(), digest_size=8).hexdigest(),
        "page_size": str(pool.page_size),
    }
