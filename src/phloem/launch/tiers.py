"""Whether an engine has cache tiers beyond its pool, how large, and why. What is wrong is told before it is ready."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import math
import secrets
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from phloem.checkpoint.fingerprint import fingerprint, weight_files
from phloem.core.config import cache_home
from phloem.core.errors import ConfigError
from phloem.core.ranges import parse_bytes
from phloem.core.resolve import GIB, Decision
from phloem.engine.ranks import parallel
from phloem.engine.ranks.unshared import option_of
from phloem.engine.runner import ModelRunner
from phloem.kvcache.tiers import TIERS, Place, Tier, rounded
from phloem.kvcache.tiers._copies import PoolCopies
from phloem.kvcache.tiers._fetch import TIMEOUT_BASE, TIMEOUT_PER_KI_TOKEN, Waiting
from phloem.kvcache.tiers._keys import Keys
from phloem.kvcache.tiers._service import Settings, Surroundings, Tiers
from phloem.kvcache.tiers.host import Tier as Host
from phloem.platforms._facts import in_host_memory
from phloem.utils import log, machine

if TYPE_CHECKING:
    from phloem.checkpoint.describe import Checkpoint
    from phloem.core.config import Config
    from phloem.engine.worker import Built
    from phloem.kvcache.pool import KVPool
    from phloem.scheduler.scheduler import Scheduler

_log = log.get("launch")

NAME = "hierarchical_cache"
EXTRA = "hicache_storage_backend_extra_config"
NAMES = {"file": "disk"}  # of stores, as other engines call them
# Of stores that keep files: their folder in the cache folder, and how files of earlier runs are called in it.
FOLDERS = {"disk": ("hicache", "replica-*/segment-*"), "nixl": ("hicache-nixl", "??/*.page")}
SHARED = ("mooncake", "nixl")  # stores that servers of other machines read, whose copies of a model have other times
RATIO = 2.0  # of a pool on a device
STAGING = 512 << 20  # bytes that pages pass through on their way to a store and back, where the pool is in host memory
DISK_SHARE = 4  # of what is free, one part
# Choices that numbers in pages depend on.
FACTS = ("dtype", "kv_cache_dtype", "attention_backend", "ops", "quantization", "activations", "model_impl", "platform")


class Extra(msgspec.Struct, frozen=True, kw_only=True):
    """What `EXTRA` may say of every store; what else it says is the store's own."""

    path: str | None = None
    max_size: str | None = None
    prefetch_threshold: int = 0  # tokens
    prefetch_timeout_base: float = TIMEOUT_BASE
    prefetch_timeout_per_ki_token: float = TIMEOUT_PER_KI_TOKEN


def check(config: Config) -> None:
    """Raises ConfigError for settings that contradict each other, whatever the model."""
    cache = config.cache
    if not cache.enable_hierarchical_cache:
        asked = {
            "hicache_storage_backend": cache.hicache_storage_backend,
            "hicache_ratio": cache.hicache_ratio,
            "hicache_size": cache.hicache_size or None,
            EXTRA: cache.hicache_storage_backend_extra_config,
        }
        for name, value in asked.items():
            if value is not None:
                raise ConfigError(f"{name}: needs enable_hierarchical_cache", param=name)
        return
    if cache.disable_radix_cache:
        text = "enable_hierarchical_cache: prefixes are not shared (disable_radix_cache)"
        raise ConfigError(text, param="enable_hierarchical_cache")
    if cache.hicache_storage_backend is not None:
        _store_of(cache.hicache_storage_backend)
    elif cache.hicache_storage_backend_extra_config is not None:
        raise ConfigError(f"{EXTRA}: needs hicache_storage_backend", param=EXTRA)
    extra, own = read_extra(cache.hicache_storage_backend_extra_config)
    _check_own(cache.hicache_storage_backend, extra, own)
    if extra.max_size is not None and parse_bytes(extra.max_size, f"{EXTRA}: max_size") < 1:
        raise ConfigError(f"{EXTRA}: max_size: {extra.max_size!r} is not above 0", param=EXTRA)


def _check_own(backend: str | None, extra: Extra, own: dict[str, Any]) -> None:
    """Raises ConfigError: the store has no such settings."""
    name = "disk" if backend is None else _store_of(backend)
    settings: tuple[str, ...] | None = vars(TIERS.module(name)).get("SETTINGS", ())
    if settings is None:
        return
    if strange := sorted(own.keys() - set(settings)):
        known = ", ".join([*settings, *Extra.__struct_fields__])
        raise ConfigError(f"{EXTRA}: unknown {', '.join(strange)[:200]}; known: {known}", param=EXTRA)
    for setting in ("path", "max_size"):
        if name not in FOLDERS and getattr(extra, setting) is not None:
            raise ConfigError(f"{EXTRA}: {setting}: {backend} has no folder", param=EXTRA)


def read_extra(text: str | None) -> tuple[Extra, dict[str, Any]]:
    """The settings of all stores, and those of one. Raises ConfigError."""
    if text is None:
        return Extra(), {}
    try:
        if text.startswith("@"):
            text = Path(text[1:]).read_text()
        found = json.loads(text)
        if not isinstance(found, dict):
            raise ValueError("not an object")
        extra = msgspec.convert(found, Extra)
    except (OSError, ValueError, msgspec.ValidationError) as error:
        raise ConfigError(f"{EXTRA}: {error}", param=EXTRA) from None
    for name in ("prefetch_threshold", "prefetch_timeout_base", "prefetch_timeout_per_ki_token"):
        value = getattr(extra, name)
        if not (math.isfinite(value) and value >= 0):
            raise ConfigError(f"{EXTRA}: {name}: {value} must be 0 or above", param=EXTRA)
    return extra, {key: value for key, value in found.items() if key not in Extra.__struct_fields__}


def _store_of(backend: str) -> str:
    """The file of a store. Raises ConfigError: there is none of this name."""
    name = NAMES.get(backend, backend)
    stores = [one for one in TIERS.names() if one != "host"]
    if name not in stores:
        shown = {file: other for other, file in NAMES.items()}
        known = ", ".join(shown.get(one, one) for one in stores)
        raise ConfigError(
            f"hicache_storage_backend: {backend!r:.100} is not one of {known}", param="hicache_storage_backend"
        )
    return name


def tiers_of(config: Config, checkpoint: Checkpoint, built: Built, scheduler: Scheduler) -> Tiers | None:
    """What an engine has beyond its pool; None: nothing. Why stands in its decisions.

    Raises:
        ConfigError: more memory or disk is asked for than there is, or a folder that cannot be had.
    """
    if not config.cache.enable_hierarchical_cache:
        return None
    why = declines(config, built, scheduler, windows=True)
    if why or not isinstance(built.runner, ModelRunner):
        built.decisions.append(Decision(NAME, "none", why))
        _log.warning("no cache tiers: %s", why)
        return None
    cache, pool = config.cache, built.runner.pool
    copies = PoolCopies(pool)
    row = rounded(copies.page_bytes)
    place = _host_place(config, pool, row, built.decisions)
    state = -(-copies.state_bytes // row)
    if place.most_bytes // row < 2 * state + 2:
        held = place.most_bytes // row
        why = f"a recurrent state fills {state} rows, of which host memory holds {held}: hicache_size asks for more"
        built.decisions[-1] = Decision(NAME, "none", why)
        _log.warning("no cache tiers: %s", why)
        return None
    keys = Keys(_facts(config, checkpoint, built, pool), pool.page_size)
    extra, own = read_extra(cache.hicache_storage_backend_extra_config)
    storage = _storage(config, extra, own, row, built.decisions)
    waiting = Waiting(
        cache.hicache_storage_prefetch_policy, extra.prefetch_timeout_base, extra.prefetch_timeout_per_ki_token
    )
    meter = scheduler.meter
    around = Surroundings(
        between=scheduler.between,
        version=lambda: scheduler.weight_version,
        could_run=lambda: scheduler.slots.num_free > 0 and not len(scheduler.queue),
        prefill_rate=lambda: meter.prefill_tokens / meter.prefill_seconds if meter.prefill_seconds > 0.1 else 0.0,
    )
    settings = Settings(cache.hicache_write_policy, waiting, extra.prefetch_threshold)
    found = Tiers(scheduler.cache, copies, keys, Host(place), storage, settings, around)
    scheduler.further = found
    return found


def declines(config: Config, built: Built, scheduler: Scheduler, windows: bool = False) -> str:
    """Why this engine has none; "": it can. `windows`: those beside memory of all tokens are no hindrance."""
    runner = built.runner
    if built.denoising is not None:
        return "the model writes by diffusion: its texts grow by blocks, of which none is kept beyond the pool"
    if not isinstance(runner, ModelRunner):
        return "the model does not generate: nothing of its texts is kept"
    if parallel.ranks_of(config) > 1:
        name, size = option_of(config)
        return f"each of several ranks has a part of every page ({name} {size})"
    if not scheduler.cache.enabled:
        return "prefixes are not shared"
    pool = runner.pool
    kinds = [group.kind if group.kind != "pages" or not group.window else "window" for group in pool.groups]
    if windows and kinds[0] == "pages" and set(kinds[1:]) == {"window"}:
        if config.cache.hicache_write_policy == "write_back":
            return "windows lose their pages before the pool gives up the others (hicache_write_policy write_back)"
    elif windows and kinds == ["pages", "state"]:
        if config.cache.hicache_write_policy == "write_back":
            return "states leave the pool before pages do (hicache_write_policy write_back)"
        if config.cache.hicache_storage_backend not in (None, "file"):
            backend = config.cache.hicache_storage_backend
            return f"recurrent states need a store that knows at once what it has (hicache_storage_backend {backend})"
    elif kinds != ["pages"]:
        named = {"window": "sliding windows", "state": "recurrent states", "cross": "audio", "pages": "all tokens"}
        return f"its memory is of several kinds ({', '.join(named[kind] for kind in kinds)})"
    if pool.routes is not None:
        return "the experts of tokens are told (enable_return_routed_experts), which pages alone do not know"
    if runner.drafts is not None:
        return "a model drafts, which keeps pages of its own"
    return ""


def _host_place(config: Config, pool: KVPool, row: int, decisions: list[Decision]) -> Place:
    """How much host memory pages may take. Raises ConfigError: more is asked for than there is."""
    cache, on_host = config.cache, in_host_memory(pool.device)
    free = machine.memory()[0] // config.runtime.dp_size
    asked: tuple[str, float, str] | None = None
    if cache.hicache_size > 0:
        asked = "hicache_size", cache.hicache_size * 1e9, f"{cache.hicache_size} GB"
    elif cache.hicache_ratio is not None:
        asked = "hicache_ratio", cache.hicache_ratio * pool.nbytes, f"{cache.hicache_ratio} times the KV pool"
    if asked is not None:
        name, size, text = asked
        if not size <= free:
            raise ConfigError(
                f"{name}: {text} are {size / GIB:.1f} GiB of host memory, of which {free / GIB:.1f} GiB are free "
                "for each replica",
                param=name,
            )
        if size < row:
            raise ConfigError(f"{name}: {text} hold no page of {row} bytes", param=name)
        most, why = int(size), "as asked"
    elif on_host:
        most = min(STAGING, pool.nbytes)
        why = "the pool is in host memory already: rows to pass through; hicache_ratio or hicache_size asks for more"
    else:
        most, why = int(RATIO * pool.nbytes), f"{RATIO} times the KV pool"
    if asked is None and most > free // 2:
        most, why = free // 2, f"half of the free host memory: {why} would be more"
    most = max(most, row)
    decisions.append(Decision(NAME, f"{most // row * pool.page_size} tokens in host memory", why))
    return Place(row, most)


def _storage(config: Config, extra: Extra, own: dict[str, Any], row: int, decisions: list[Decision]) -> Tier | None:
    backend = config.cache.hicache_storage_backend
    if backend is None:
        return None
    name = _store_of(backend)
    folder, most, why = None, 0, "as its own settings say"
    if name in FOLDERS:
        usual, files = FOLDERS[name]
        folder = Path(extra.path) if extra.path else cache_home() / usual
        most, why = _disk_room(folder, files, extra, row, config.runtime.dp_size)
    storage = TIERS.get(name)(Place(row, most, folder, own))
    decisions.append(Decision("hicache_storage_backend", backend, f"{folder}, at most {most >> 20} MiB: {why}"
                              if folder is not None else why))  # fmt: skip
    return storage


def _disk_room(folder: Path, files: str, extra: Extra, row: int, replicas: int) -> tuple[int, str]:
    """Bytes that a store may take, and why. Raises ConfigError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        disk = shutil.disk_usage(folder)
    except OSError as error:
        raise ConfigError(f"{EXTRA}: path: {folder}: {error.strerror or error}", param=EXTRA) from None
    if extra.max_size is None:
        most = (disk.free + sum(_sizes(folder, files))) // DISK_SHARE // replicas
        if most < row:
            raise ConfigError(f"{EXTRA}: path: {folder}: the disk is full", param=EXTRA)
        return most, f"a quarter of what is free, shared by {replicas}" if replicas > 1 else "a quarter of what is free"
    most = parse_bytes(extra.max_size, f"{EXTRA}: max_size")
    if most * replicas > disk.total:
        raise ConfigError(
            f"{EXTRA}: max_size: {extra.max_size} for each of {replicas} replicas is more than the disk of "
            f"{disk.total / GIB:.1f} GiB",
            param=EXTRA,
        )
    if most < row:
        raise ConfigError(f"{EXTRA}: max_size: {extra.max_size} holds no page of {row} bytes", param=EXTRA)
    return most, "as asked"


def _sizes(folder: Path, files: str) -> list[int]:
    """Of what earlier runs have left."""
    found: list[int] = []
    for path in folder.glob(files):
        with contextlib.suppress(OSError):
            found.append(path.stat().st_size)
    return found


def _facts(config: Config, checkpoint: Checkpoint, built: Built, pool: KVPool) -> list[str]:
    """What the content of a page depends on, beside its tokens and namespace."""
    files = weight_files(checkpoint)
    timed = () if config.cache.hicache_storage_backend in SHARED else files
    facts = [
        f"phloem {_version()}",
        checkpoint.model_type,
        json.dumps(checkpoint.config, sort_keys=True, default=str),
        fingerprint(checkpoint),
        *(f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in timed),
        *(f"{one.name} {one.value}" for one in built.decisions if one.name in FACTS),
        f"{config.model.quantization} {built.context_length} {pool.dtype} {pool.device} {pool.memory!r}",
        repr(sorted((layer, scales.k_values, scales.v_values) for layer, scales in pool.scales.items())),
        repr(vars(config.runtime)["cpu_level"]),
    ]
    return facts if files else [*facts, secrets.token_hex(16)]  # random weights are nobody else's


def _version() -> str:
    try:
        return importlib.metadata.version("phloem")
    except importlib.metadata.PackageNotFoundError:
        return "?"
