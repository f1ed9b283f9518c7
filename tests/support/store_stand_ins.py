"""Stand-ins for the packages of distant stores, with the calls that tiers make of them, and faults on demand; and the
real ones, where they are installed."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

NOT_FOUND, UNREACHABLE = -704, -900


class Fault:
    """What goes wrong with every store of a stand-in: `code` is each answer, `gate` what each call waits for."""

    def __init__(self) -> None:
        self.code = 0
        self.put_code = 0
        self.gate: threading.Event | None = None
        self.calls = 0

    def passed(self) -> bool:
        """False: answer with `code`."""
        self.calls += 1
        if self.gate is not None:
            self.gate.wait(20)
        return not self.code


class FakeMooncake:
    """`MooncakeDistributedStore` over a dictionary for each master. Memory that was not registered is refused."""

    fault = Fault()
    held: dict[str, dict[str, bytes]] = {}

    def __init__(self) -> None:
        self._objects: dict[str, bytes] = {}
        self._memory: dict[int, int] = {}
        self.closed = False

    def setup(self, *args: Any) -> int:
        self.given = args
        self._objects = self.held.setdefault(args[-1], {})
        return self.fault.code

    def _known(self, address: int, size: int) -> bool:
        return any(start <= address and address + size <= start + count for start, count in self._memory.items())

    def register_buffer(self, address: int, size: int) -> int:
        self._memory[address] = size
        return 0

    def unregister_buffer(self, address: int) -> int:
        del self._memory[address]
        return 0

    def batch_is_exist(self, names: list[str]) -> list[int]:
        fine = self.fault.passed()
        return [int(name in self._objects) if fine else self.fault.code for name in names]

    def batch_put_from(self, names: list[str], addresses: list[int], sizes: list[int]) -> list[int]:
        code = 0 if self.fault.passed() else self.fault.code
        codes: list[int] = []
        for name, address, size in zip(names, addresses, sizes, strict=True):
            found = code or self.fault.put_code or (0 if self._known(address, size) else -600)
            if not found:
                self._objects.setdefault(name, ctypes.string_at(address, size))
            codes.append(found)
        return codes

    def batch_get_into(self, names: list[str], addresses: list[int], sizes: list[int]) -> list[int]:
        fine = self.fault.passed()
        codes: list[int] = []
        for name, address, size in zip(names, addresses, sizes, strict=True):
            data = self._objects.get(name)
            if not fine or data is None or len(data) > size or not self._known(address, size):
                codes.append(self.fault.code or (NOT_FOUND if data is None else -600))
                continue
            ctypes.memmove(address, data, len(data))
            codes.append(len(data))
        return codes

    def batch_remove(self, names: list[str], force: bool) -> list[int]:
        assert force, "somebody has just asked for it"
        if not self.fault.passed():
            return [self.fault.code] * len(names)
        return [NOT_FOUND if self._objects.pop(name, None) is None else 0 for name in names]

    def remove_by_regex(self, pattern: str, force: bool) -> int:
        assert force
        gone = [name for name in self._objects if re.search(pattern, name)]
        for name in gone:
            del self._objects[name]
        return len(gone)

    def close(self) -> int:
        self.closed = True
        return 0


class _Sync:
    NIXL_THREAD_SYNC_STRICT = "strict"


class FakeNixl:
    """`nixl_agent` whose transfers are `os.pread` and `os.pwrite`."""

    fault = Fault()

    def __init__(self, name: str, config: dict[str, Any]) -> None:
        if config["backends"] != ["POSIX"]:
            raise KeyError(config["backends"][0])
        assert config["sync_mode"] == _Sync.NIXL_THREAD_SYNC_STRICT, "it is called from several threads"
        self._name = name
        self._known: list[tuple[list[Any], str]] = []

    def register_memory(self, regions: list[Any], kind: str) -> Any:
        assert kind in ("DRAM", "FILE") and all(len(one) == 4 for one in regions)
        self._known.append((regions, kind))
        return self._known[-1]

    def deregister_memory(self, known: Any) -> None:
        self._known.remove(known)

    def get_xfer_descs(self, places: list[Any], kind: str) -> Any:
        regions = [one for found, other in self._known if other == kind for one in found]
        inside = [
            any(one[0] <= place[0] and place[0] + place[1] <= one[0] + one[1] and place[2] == one[2] for one in regions)
            for place in places
        ]
        assert all(inside), "memory that was not registered"
        return places

    def initialize_xfer(self, what: str, local: Any, remote: Any, name: str) -> Any:
        assert name == self._name and len(local) == len(remote)
        return what, local, remote

    def transfer(self, handle: Any) -> str:
        if not self.fault.passed():
            return "ERR"
        what, local, remote = handle
        for (address, size, _), (start, count, file) in zip(local, remote, strict=True):
            assert size == count
            if what == "WRITE":
                os.pwrite(file, ctypes.string_at(address, size), start)
            else:
                data = os.pread(file, size, start)
                assert len(data) == size
                ctypes.memmove(address, data, size)
        return "PROC"

    def check_xfer_state(self, handle: Any) -> str:
        return "DONE"

    def release_xfer_handle(self, handle: Any) -> None: ...


class Stores:
    """Tiers of one kind. `extra`: what its settings must say. `fault`: None: they are real."""

    def __init__(self, name: str, extra: dict[str, Any], fault: Fault | None, folder: Path | None) -> None:
        self.name, self.extra, self.fault, self.folder = name, extra, fault, folder


def stand_in(name: str, monkeypatch: pytest.MonkeyPatch, folder: Path) -> Iterator[Stores]:
    """The tier `name` over a stand-in for its package."""
    fault = Fault()
    if name == "mooncake":
        kind = type("Fake", (FakeMooncake,), {"fault": fault, "held": {}})
        _module(monkeypatch, "mooncake.store", MooncakeDistributedStore=kind)
        with socket.create_server(("127.0.0.1", 0)) as master:
            address = f"127.0.0.1:{master.getsockname()[1]}"
            yield Stores(name, {"master_server_address": address, "global_segment_size": 1 << 20}, fault, None)
        return
    kind = type("Fake", (FakeNixl,), {"fault": fault})
    _module(monkeypatch, "nixl._api", nixl_agent=kind, nixl_agent_config=dict, nixl_thread_sync_t=_Sync)
    yield Stores(name, {}, fault, folder)


def _module(monkeypatch: pytest.MonkeyPatch, path: str, **names: Any) -> None:
    package, _, _ = path.partition(".")
    made = ModuleType(path)
    vars(made).update(names)
    monkeypatch.setitem(sys.modules, package, ModuleType(package))
    monkeypatch.setitem(sys.modules, path, made)


class Master:
    """A real `mooncake_master`."""

    def __init__(self) -> None:
        spec = importlib.util.find_spec("mooncake")
        if spec is None or not spec.submodule_search_locations:
            pytest.skip("mooncake-transfer-engine-non-cuda is not installed")
        pytest.importorskip("mooncake.store", reason="no libibverbs1 or librdmacm1", exc_type=ImportError)
        self._binary = Path(spec.submodule_search_locations[0]) / "mooncake_master"
        self._ports = [_free_port(), _free_port()]
        self.address = f"127.0.0.1:{self._ports[0]}"
        self.start()

    def start(self) -> None:
        rpc, metrics = self._ports
        command = [str(self._binary), f"--rpc_port={rpc}", f"--metrics_port={metrics}", "--default_kv_lease_ttl=200"]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        end = time.monotonic() + 30
        while True:
            try:
                socket.create_connection(("127.0.0.1", rpc), 1).close()
                return
            except OSError:
                assert time.monotonic() < end and self.process.poll() is None, "the master did not start"
                time.sleep(0.05)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def client_of(master: Master, mebibytes: int = 64) -> Any:
    """A client that lends memory to the store, so that what others write outlives them."""
    from mooncake.store import MooncakeDistributedStore  # pyright: ignore[reportMissingImports]

    store: Any = MooncakeDistributedStore()
    assert store.setup("127.0.0.1", "P2PHANDSHAKE", mebibytes << 20, 16 << 20, "tcp", "", master.address) == 0
    return store


def real(name: str, folder: Path) -> Iterator[Stores]:
    """The tier `name` over its package; skips the test where that is not installed."""
    if name == "nixl":
        pytest.importorskip("nixl._api", reason="nixl is not installed")
        yield Stores(name, {}, None, folder)
        return
    master = Master()
    client = client_of(master)
    try:
        yield Stores(name, {"master_server_address": master.address, "global_segment_size": 0}, None, None)
    finally:
        client.close()
        master.kill()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return sock.getsockname()[1]
