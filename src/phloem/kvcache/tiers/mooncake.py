"""Mooncake's store: memory of many machines as one, which several servers share. `--hicache-storage-backend mooncake`.

A master (`mooncake_master`) knows where each object lies; clients read and write each other's memory directly. This
process is a client, and lends `global_segment_size` of its own memory: what lies there ends with it, so that pages
which are to outlive servers need a store service of its own (`mooncake_client`), and 0 here.

The settings have SGLang's names (`Given`). https://github.com/kvcache-ai/Mooncake
"""

from __future__ import annotations

import re
import socket
import threading
from time import monotonic
from typing import TYPE_CHECKING, Any

import msgspec

from phloem.core.errors import ConfigError
from phloem.core.ranges import parse_bytes
from phloem.kvcache.tiers._staged import REST, Distant, StoreFailed, in_calls
from phloem.utils import machine

if TYPE_CHECKING:
    from collections.abc import Sequence

    from phloem.kvcache.tiers import Place, Row
    from phloem.kvcache.tiers._staged import Stage

PARAM = "hicache_storage_backend_extra_config"
SETUP_SECONDS = 30.0
REACH_SECONDS = 5.0
NOT_THERE = -704  # OBJECT_NOT_FOUND
FULL = -200  # NO_AVAILABLE_HANDLE
INSTALL = "pip install mooncake-transfer-engine-non-cuda, and libibverbs1 and librdmacm1 of the system"
_TAG = re.compile(r"[A-Za-z0-9_.-]{0,64}")


class Given(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`local_hostname`: by which other clients reach this one; default: the address towards the master.
    `extra_backend_tag`: servers of other tags share nothing."""

    master_server_address: str
    local_hostname: str = ""
    metadata_server: str = "P2PHANDSHAKE"
    global_segment_size: int | str = 4 << 30
    local_buffer_size: int | str = 16 << 20
    protocol: str = "tcp"
    device_name: str = ""
    extra_backend_tag: str = ""


SETTINGS = Given.__struct_fields__


class Tier:
    """Raises ConfigError where the store cannot be had."""

    name, instant = "mooncake", False

    def __init__(self, place: Place) -> None:
        given = _given(dict(place.extra))
        self._prefix = f"{given.extra_backend_tag}/phloem/" if given.extra_backend_tag else "phloem/"
        self._store: Any = _store()
        self._distant = Distant(f"Mooncake's store at {given.master_server_address}", place.page_bytes, self._register)
        self._lock = threading.Lock()
        self.written, self._full_until = 0, 0.0
        _set_up(self._store, given)

    def _register(self, stage: Stage) -> int:
        address = stage.address(0)
        if code := self._store.register_buffer(address, stage.flat.nbytes):
            raise StoreFailed(f"it does not take memory: {code}")
        return address

    def _names(self, keys: Sequence[bytes]) -> list[str]:
        return [self._prefix + key.hex() for key in keys]

    # the contract

    def exists(self, keys: Sequence[bytes]) -> int:
        if not keys:
            return 0
        names = self._names(keys)
        return self._distant.ask(lambda: _run(self._store.batch_is_exist(names)), 0)

    def read(self, keys: Sequence[bytes], rows: Sequence[Row]) -> int:
        return in_calls(keys, rows, self._read)

    def _read(self, keys: Sequence[bytes], rows: Sequence[Row]) -> int:
        with self._distant.stage() as stage:
            if stage is None:
                return 0
            names, places, sizes = self._names(keys), stage.addresses(len(keys)), [stage.nbytes] * len(keys)
            codes: list[int] = self._distant.ask(lambda: self._store.batch_get_into(names, places, sizes), [], stage)
            # A row that is longer or shorter is of no use, as one that is not there.
            came = next((at for at, code in enumerate(codes) if code != stage.nbytes), len(codes))
            right = self._distant.believed(stage, keys[:came], rows, lambda key: self.drop([key]))
            if right < came:
                return right
            if came < len(codes) and codes[came] < 0 and codes[came] != NOT_THERE:
                self._distant.fault(f"reading fails: {codes[came]}")
            return came

    def write(self, keys: Sequence[bytes], rows: Sequence[Row]) -> int:
        done = in_calls(keys, rows, self._write)
        with self._lock:
            self.written += done
        return done

    def _write(self, keys: Sequence[bytes], rows: Sequence[Row]) -> int:
        if monotonic() < self._full_until:
            return 0
        with self._distant.stage() as stage:
            if stage is None:
                return 0
            for at, (key, row) in enumerate(zip(keys, rows, strict=False)):
                stage.put(at, key, row)
            names, places, sizes = self._names(keys), stage.addresses(len(keys)), [stage.nbytes] * len(keys)
            codes: list[int] = self._distant.ask(lambda: self._store.batch_put_from(names, places, sizes), [], stage)
            went = next((at for at, code in enumerate(codes) if code != 0), len(codes))
            if went < len(codes) and codes[went] == FULL:
                self._full_until = monotonic() + REST
                self._distant.fault("it is full", rests=False)
            elif went < len(codes):
                self._distant.fault(f"writing fails: {codes[went]}")
            return went

    def drop(self, keys: Sequence[bytes]) -> None:
        self._distant.ask(lambda: self._remove(keys), None)

    def _remove(self, keys: Sequence[bytes]) -> None:
        # By force: a page that is not believed goes, though somebody has just asked for it.
        self._store.batch_remove(self._names(keys), True)

    def clear(self) -> None:
        """Of all servers with this tag."""
        pattern = "^" + re.escape(self._prefix)
        code = self._distant.ask(lambda: int(self._store.remove_by_regex(pattern, True)), 0)
        if code < 0:
            self._distant.fault(f"clearing fails: {code}")
        with self._lock:
            self.written = 0

    def stats(self) -> dict[str, float]:
        return {"pages": self.written, "failed": self._distant.failed, "corrupt": self._distant.corrupt}

    def close(self) -> None:
        stages = self._distant.end()

        def work() -> None:
            for stage in stages:
                self._store.unregister_buffer(stage.registered)
            self._store.close()

        self._distant.ask(work, None)


def _run(codes: Sequence[int]) -> int:
    """How many, from the first on, are there. Raises StoreFailed: of the next one it says neither yes nor no."""
    at = next((at for at, code in enumerate(codes) if code != 1), len(codes))
    if at < len(codes) and codes[at] != 0:
        raise StoreFailed(f"it does not answer: {codes[at]}")
    return at


def _given(extra: dict[str, Any]) -> Given:
    """Raises ConfigError."""
    try:
        given = msgspec.convert(extra, Given)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{PARAM}: mooncake: {error}", param=PARAM) from None
    if not _TAG.fullmatch(given.extra_backend_tag):
        raise ConfigError(f"{PARAM}: extra_backend_tag: letters, digits, '.', '_' and '-', 64 at most", param=PARAM)
    lent = _size(given, "global_segment_size")
    if lent > machine.memory()[0]:
        free = machine.memory()[0] >> 20
        raise ConfigError(f"{PARAM}: global_segment_size: {lent >> 20} MiB, of which {free} MiB are free", param=PARAM)
    return given


def _size(given: Given, name: str) -> int:
    """Raises ConfigError."""
    value = given.global_segment_size if name == "global_segment_size" else given.local_buffer_size
    # Units as Mooncake has them: one letter or two, of powers of two.
    if isinstance(value, str):
        value = parse_bytes(re.sub(r"(?i)([kmg])b?\s*$", r"\1iB", value), f"{PARAM}: {name}")
    if value < 0:
        raise ConfigError(f"{PARAM}: {name}: {value} must be 0 or above", param=PARAM)
    return value


def _store() -> Any:
    """Raises ConfigError: it is not installed."""
    try:
        from mooncake.store import MooncakeDistributedStore  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ConfigError(f"hicache_storage_backend: mooncake: {error}: {INSTALL}", param=PARAM) from None
    store: Any = MooncakeDistributedStore()
    return store


def _set_up(store: Any, given: Given) -> None:
    """Raises ConfigError: there is no master, or it does not take this client."""
    here = _reached(given.master_server_address)
    sizes = _size(given, "global_segment_size"), _size(given, "local_buffer_size")
    codes: list[Any] = []

    def work() -> None:
        try:
            name = given.local_hostname or here
            master, device = given.master_server_address, given.device_name
            codes.append(store.setup(name, given.metadata_server, *sizes, given.protocol, device, master))
        except Exception as error:
            codes.append(f"{type(error).__name__}: {error}")

    # Apart, as it may try for minutes.
    thread = threading.Thread(target=work, name="phloem-store", daemon=True)
    thread.start()
    thread.join(SETUP_SECONDS)
    if codes != [0]:
        why = codes[0] if codes else f"no answer within {SETUP_SECONDS:g} s"
        raise ConfigError(f"{PARAM}: mooncake: the store cannot be set up: {why}", param=PARAM)


def _reached(master: str) -> str:
    """The address of this machine towards the master. Raises ConfigError: nobody listens there."""
    if "://" in master:
        return "127.0.0.1"  # masters that are found elsewhere
    host, _, port = master.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), REACH_SECONDS) as sock:
            return str(sock.getsockname()[0])
    except (OSError, ValueError) as error:
        text = f"{PARAM}: master_server_address: no mooncake_master at {master!r:.100}: {error}"
        raise ConfigError(text, param=PARAM) from None
