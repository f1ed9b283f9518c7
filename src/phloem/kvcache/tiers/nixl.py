"""Files by NIXL's storage plug-ins, a file for each page, which several servers may share on one file system.

`--hicache-storage-backend nixl`. Files are written under another name first: what a killed process leaves is a file
that nobody looks for, which the next start removes once it is an hour old. Of the files that this process has found or
written those go first that it was not asked for longest.

Tried with the plug-in POSIX. https://github.com/ai-dynamo/nixl
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
import uuid
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import msgspec

from phloem.core.errors import ConfigError
from phloem.kvcache.tiers import KEY_BYTES
from phloem.kvcache.tiers._staged import CHECK_BYTES, Distant, StoreFailed, in_calls
from phloem.utils.nixl_agent import agent

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from phloem.kvcache.tiers import Place, Row
    from phloem.kvcache.tiers._staged import Stage

PARAM = "hicache_storage_backend_extra_config"
SUFFIX, PART = ".page", ".part"
STALE_SECONDS = 3600.0  # of a file that somebody may still be writing
_FAN = 2  # digits of a key that name a folder


class Given(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`plugin`: which of NIXL's moves the bytes."""

    plugin: str = "POSIX"


SETTINGS = Given.__struct_fields__


class Tier:
    """Raises ConfigError where NIXL, its plug-in or the folder cannot be had."""

    name, instant = "nixl", False

    def __init__(self, place: Place) -> None:
        if place.folder is None:
            raise ConfigError(f"{PARAM}: the store of files needs a path", param=PARAM)
        self._folder, self._most = place.folder, place.most_bytes
        self._each = place.page_bytes + CHECK_BYTES
        self._lock = threading.Lock()
        self._found: OrderedDict[bytes, None] = OrderedDict()  # least recently used first
        self.evicted = 0
        self._name = f"phloem-{uuid.uuid4().hex}"
        self._agent: Any = _agent(self._name, dict(place.extra))
        self._distant = Distant(f"the store in {place.folder}", place.page_bytes, self._register)
        try:
            place.folder.mkdir(parents=True, exist_ok=True)
            self._scan()
        except OSError as error:
            text = f"{PARAM}: path: {place.folder}: {error.strerror or error}"
            raise ConfigError(text, param=PARAM) from None

    def _register(self, stage: Stage) -> Any:
        return self._agent.register_memory([(stage.address(0), stage.flat.nbytes, 0, "")], "DRAM")

    def _path(self, key: bytes) -> Path:
        text = key.hex()
        return self._folder / text[:_FAN] / (text + SUFFIX)

    def _scan(self) -> None:
        """What is there already, oldest first. Raises OSError."""
        seen: list[tuple[float, bytes]] = []
        for path in self._folder.glob(f"{'[0-9a-f]' * _FAN}/*"):
            with contextlib.suppress(OSError, ValueError):  # others may remove files meanwhile
                facts = path.stat()
                if path.suffix == PART and facts.st_mtime < time.time() - STALE_SECONDS:
                    path.unlink()
                elif path.suffix == SUFFIX and facts.st_size == self._each:
                    key = bytes.fromhex(path.stem)
                    if len(key) == KEY_BYTES:
                        seen.append((facts.st_mtime, key))
        self._found.update((key, None) for _, key in sorted(seen))

    # the contract

    def exists(self, keys: Sequence[bytes]) -> int:
        return self._distant.ask(lambda: self._run(keys), 0)

    def _run(self, keys: Sequence[bytes]) -> int:
        return next((at for at, key in enumerate(keys) if not self._there(key)), len(keys))

    def _there(self, key: bytes) -> bool:
        """On the disk: another server may have written it, or removed it."""
        try:
            return os.stat(self._path(key)).st_size == self._each
        except FileNotFoundError:
            return False

    def read(self, keys: Sequence[bytes], rows: Sequence[Row]) -> int:
        return in_calls(keys, rows, self._read)

    def _read(self, keys: Sequence[bytes], rows: Sequence[Row]) -> int:
        with self._distant.stage() as stage:
            if stage is None:
                return 0
            came = self._distant.ask(lambda: self._bring(stage, keys), 0, stage)
            came = self._distant.believed(stage, keys[:came], rows, lambda key: self.drop([key]))
            self._use(keys[:came])
            return came

    def _bring(self, stage: Stage, keys: Sequence[bytes]) -> int:
        with contextlib.ExitStack() as stack:
            files: list[int] = []
            for key in keys:
                try:
                    file = os.open(self._path(key), os.O_RDONLY)
                except FileNotFoundError:
                    break
                stack.callback(os.close, file)
                if os.fstat(file).st_size != self._each:
                    break
                files.append(file)
            self._move("READ", stage, files)
            return len(files)

    def write(self, keys: Sequence[bytes], rows: Sequence[Row]) -> int:
        return in_calls(keys, rows, self._write)

    def _write(self, keys: Sequence[bytes], rows: Sequence[Row]) -> int:
        with self._distant.stage() as stage:
            if stage is None:
                return 0
            for at, (key, row) in enumerate(zip(keys, rows, strict=False)):
                stage.put(at, key, row)
            if not self._distant.ask(lambda: self._keep(stage, keys), False, stage):
                return 0
            self._use(keys)
            return len(keys)

    def _keep(self, stage: Stage, keys: Sequence[bytes]) -> bool:
        self._make_room(len(keys))
        parts: list[tuple[Path, Path]] = []
        with contextlib.ExitStack() as stack:
            files: list[int] = []
            for key in keys:
                path = self._path(key)
                path.parent.mkdir(parents=True, exist_ok=True)
                part = path.with_name(f"{path.stem}-{uuid.uuid4().hex[:8]}{PART}")
                files.append(os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
                stack.callback(os.close, files[-1])
                stack.callback(part.unlink, missing_ok=True)  # a part that has its name is there no more
                parts.append((part, path))
            self._move("WRITE", stage, files)
            for part, path in parts:
                part.replace(path)
        return True

    def _move(self, what: str, stage: Stage, files: Sequence[int]) -> None:
        """Between places of the stage and files, in their order. Raises StoreFailed, or what NIXL raises."""
        if not files:
            return
        agent, each = self._agent, self._each
        known = agent.register_memory([(0, each, file, "") for file in files], "FILE")
        try:
            places = [(address, each, 0) for address in stage.addresses(len(files))]
            local = agent.get_xfer_descs(places, "DRAM")
            remote = agent.get_xfer_descs([(0, each, file) for file in files], "FILE")
            handle = agent.initialize_xfer(what, local, remote, self._name)
            try:
                state = agent.transfer(handle)
                while state == "PROC":  # whoever waits for this thread does not wait for ever
                    time.sleep(0.0001)
                    state = agent.check_xfer_state(handle)
            finally:
                agent.release_xfer_handle(handle)
            if state != "DONE":
                raise StoreFailed(f"{what.lower()} ended as {state}")
        finally:
            agent.deregister_memory(known)

    def _use(self, keys: Sequence[bytes]) -> None:
        with self._lock:
            for key in reversed(keys):  # of a chain the end goes first
                self._found[key] = None
                self._found.move_to_end(key)

    def _make_room(self, count: int) -> None:
        with self._lock:
            more = len(self._found) + count - self._most // self._each
            gone = [self._found.popitem(last=False)[0] for _ in range(min(max(more, 0), len(self._found)))]
        self.evicted += len(gone)
        for key in gone:
            self._path(key).unlink(missing_ok=True)

    def drop(self, keys: Sequence[bytes]) -> None:
        def work() -> None:
            for key in keys:
                self._path(key).unlink(missing_ok=True)

        with self._lock:
            for key in keys:
                self._found.pop(key, None)
        self._distant.ask(work, None)

    def clear(self) -> None:
        """What this process has found or written."""
        with self._lock:
            keys = list(self._found)
        self.drop(keys)

    def stats(self) -> dict[str, float]:
        with self._lock:
            pages = len(self._found)
        told = {"pages": pages, "bytes": pages * self._each, "evicted": self.evicted}
        return {**told, "failed": self._distant.failed, "corrupt": self._distant.corrupt}

    def close(self) -> None:
        stages = self._distant.end()

        def work() -> None:
            for stage in stages:
                self._agent.deregister_memory(stage.registered)

        self._distant.ask(work, None)


def _agent(name: str, extra: dict[str, Any]) -> Any:
    """Raises ConfigError."""
    try:
        given = msgspec.convert(extra, Given)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{PARAM}: nixl: {error}", param=PARAM) from None
    try:
        return agent(name, given.plugin)
    except ImportError as error:
        text = f"hicache_storage_backend: nixl: {error}: pip install 'phloem[nixl]'"
        raise ConfigError(text, param="hicache_storage_backend") from None
    except Exception as error:
        raise ConfigError(f"{PARAM}: plugin: {given.plugin}: {type(error).__name__}: {error}", param=PARAM) from None
