"""How decode servers find prefill servers: a small HTTP server beside each prefill server, with SGLang's routes.

`GET /route` with all four ranks -1 tells the layout; with others, where the rank's pages are offered. What is ours of
the answer stands under `phloem`: an address for each transport, and the machine. Engines of other makes register
(`PUT /route`) and are told of, but pages are shared among our own alone.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import secrets
import socket
import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

from phloem.core.errors import ConfigError
from phloem.utils import log

if TYPE_CHECKING:
    from collections.abc import Sequence

    from phloem.disagg.transports import Transport

_log = log.get("disagg")

PORT = 8998
SECONDS = 2.0
RANK_SECONDS = 120.0  # that ranks of rooms are kept
MOST_RANKS = 65_536
MOST_BODY = 1 << 20
MOST_NAME = 255
PORTS = range(1, 65_536)
MOST_GUESTS = 128  # connections at once: the one that has been here longest makes room for another
VISIT = 20.0  # seconds that a connection lasts, whatever it says
ANSWER = 4.0  # seconds that a bootstrap server may take, however slowly it talks
RANKS = ("prefill_dp_rank", "prefill_cp_rank", "target_tp_rank", "target_pp_rank")


class Unknown(Exception):
    """There is no prefill server, or none to whom one could talk."""


@dataclass(frozen=True)
class Peer:
    host: str
    machine: str
    addresses: dict[str, str]


@dataclass
class Directory:
    """What a bootstrap server answers. `own`: the fields of `GET /route` of the server's own rank."""

    topology: dict[str, Any]
    own: dict[str, Any]
    ranks: OrderedDict[int, tuple[int, float]] = field(default_factory=OrderedDict[int, tuple[int, float]])
    others: dict[tuple[int, ...], dict[str, Any]] = field(default_factory=dict[tuple[int, ...], dict[str, Any]])
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def route(self, asked: tuple[int, ...]) -> tuple[int, dict[str, Any]]:
        if asked == (-1,) * len(RANKS):
            return 200, self.topology
        with self.lock:
            found = self.others.get(asked, self.own if not any(asked) else None)
        return (200, found) if found is not None else (404, {"error": f"there is no rank {asked}"})

    def register(self, told: dict[str, Any]) -> tuple[int, Any]:
        names = ("system_dp_rank", "attn_cp_rank", "attn_tp_rank", "pp_rank")
        at = tuple(told.get(name, 0) for name in names)
        if not all(isinstance(rank, int) and 0 <= rank < MOST_RANKS for rank in at):
            return 400, {"error": "ranks are whole numbers"}
        address, port = told.get("rank_ip"), told.get("rank_port")
        if not isinstance(address, str) or len(address) > MOST_NAME or not isinstance(port, int) or port not in PORTS:
            return 400, {"error": "rank_ip and rank_port are needed"}
        with self.lock:
            if not any(at):
                return 409, {"error": "rank 0 is this server's own"}
            if len(self.others) >= 4096 and at not in self.others:
                return 503, {"error": "too many ranks"}
            self.others[at] = {"rank_ip": address, "rank_port": port}
        return 200, "OK"

    def register_room(self, told: dict[str, Any]) -> tuple[int, Any]:
        room, rank = told.get("bootstrap_room"), told.get("dp_rank")
        if not (isinstance(room, int) and 0 <= room < 1 << 63 and isinstance(rank, int) and 0 <= rank < MOST_RANKS):
            return 400, {"error": "bootstrap_room and dp_rank are needed"}
        now = monotonic()
        with self.lock:
            self.ranks[room] = rank, now
            self.ranks.move_to_end(room)
            while len(self.ranks) > MOST_RANKS or next(iter(self.ranks.values()))[1] < now - RANK_SECONDS:
                self.ranks.popitem(last=False)
        return 200, "OK"

    def query_rooms(self, told: dict[str, Any]) -> tuple[int, Any]:
        rooms = told.get("bootstrap_rooms")
        if not isinstance(rooms, list):
            return 400, {"error": "bootstrap_rooms is a list"}
        now = monotonic()
        with self.lock:
            known = {room: self.ranks[room] for room in rooms if isinstance(room, int) and room in self.ranks}
        return 200, {str(room): rank for room, (rank, at) in known.items() if at >= now - RANK_SECONDS}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 10.0
    directory: Directory

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        if parts.path == "/health":
            self._answer(200, "OK")
        elif parts.path != "/route":
            self._answer(404, {"error": "there is no such route"})
        else:
            asked = parse_qs(parts.query)
            try:
                ranks = tuple(int(asked[name][0]) for name in RANKS)
            except (KeyError, ValueError):
                self._answer(400, {"error": f"{', '.join(RANKS)} are needed, as whole numbers"})
                return
            self._answer(*self.directory.route(ranks))

    def do_PUT(self) -> None:
        self._take({"/route": self.directory.register})

    def do_POST(self) -> None:
        self._take({"/register_dp_rank": self.directory.register_room, "/query_dp_ranks": self.directory.query_rooms})

    def _take(self, routes: dict[str, Any]) -> None:
        route = routes.get(urlsplit(self.path).path)
        try:
            size = int(self.headers.get("content-length", ""))
        except ValueError:
            size = -1
        if not 0 <= size <= MOST_BODY:
            self.close_connection = True
            self._answer(400, {"error": f"a body of at most {MOST_BODY} bytes is needed"})
            return
        data = self.rfile.read(size)
        if route is None:
            self._answer(404, {"error": "there is no such route"})
            return
        try:
            told = json.loads(data)
        except (ValueError, RecursionError):
            told = None
        if isinstance(told, dict):
            self._answer(*route(told))
        else:
            self._answer(400, {"error": "a JSON object is expected"})

    def _answer(self, status: int, found: Any) -> None:
        body = found.encode() if isinstance(found, str) else json.dumps(found).encode()
        self.send_response(status)
        self.send_header("content-type", "text/plain" if isinstance(found, str) else "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        _log.debug(format, *args)


class _Server(ThreadingHTTPServer):
    """Bounds how many connections there are, and how long: who talks slowly, or not at all, keeps no thread."""

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, address: tuple[str, int], handler: type[_Handler]) -> None:
        self._guests: OrderedDict[socket.socket, float] = OrderedDict()  # since when, the oldest first
        self._door = threading.Lock()
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        super().__init__(address, handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._door:
            while len(self._guests) >= MOST_GUESTS:
                _hang_up(self._guests.popitem(last=False)[0])
            self._guests[request] = monotonic()
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._door:
            self._guests.pop(request, None)
        super().shutdown_request(request)

    def service_actions(self) -> None:
        with self._door:
            while self._guests and next(iter(self._guests.values())) < monotonic() - VISIT:
                _hang_up(self._guests.popitem(last=False)[0])

    def handle_error(self, request: Any, client_address: Any) -> None:
        _log.debug("a request at the bootstrap server broke off", exc_info=True)


def _hang_up(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)


class Bootstrap:
    """Serves a directory until it is closed. Raises ConfigError: the port is taken."""

    def __init__(self, host: str, port: int, directory: Directory) -> None:
        handler = type("Handler", (_Handler,), {"directory": directory})
        try:
            self._server = _Server((host, port), handler)
        except OSError as error:
            name = "disaggregation_bootstrap_port"
            raise ConfigError(f"{name}: {host}:{port}: {error.strerror or error}", param=name) from None
        self.port: int = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.1,), name="phloem-bootstrap", daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class Book:
    """Prefill servers that a decode server has met. `transports`: in order of preference."""

    def __init__(self, transports: Sequence[Transport]) -> None:
        self._transports = tuple(transports)
        self._known: dict[tuple[str, int], Peer] = {}
        self._machine = machine_id()

    def find(self, host: str, port: int) -> Peer:
        """Raises Unknown, OSError."""
        found = self._known.get((host, port))
        if found is None:
            found = self._known[host, port] = self._ask(host, port)
        return found

    def forget(self, host: str, port: int) -> None:
        """It is asked anew the next time: it may have been started again."""
        self._known.pop((host, port), None)

    def _ask(self, host: str, port: int) -> Peer:
        where = f"the bootstrap server {host}:{port}"
        link = http.client.HTTPConnection(host, port, timeout=SECONDS)
        timer: threading.Timer | None = None
        try:
            link.connect()
            timer = threading.Timer(ANSWER, _hang_up, (link.sock,))
            timer.daemon = True
            timer.start()
            link.request("GET", "/route?" + "&".join(f"{name}=0" for name in RANKS))
            answer = link.getresponse()
            data = answer.read(MOST_BODY)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise Unknown(f"{where} does not answer: {error}") from None
        finally:
            if timer is not None:
                timer.cancel()
            link.close()
        if answer.status != 200:
            raise Unknown(f"{where} answers {answer.status}")
        try:
            own = json.loads(data)["phloem"]
            addresses = {str(name): str(address) for name, address in own["addresses"].items()}
            return Peer(host, str(own["machine"]), addresses)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise Unknown(f"{where} is not of this engine: pages of others are laid out otherwise") from None

    def connect(self, peer: Peer) -> tuple[Transport, socket.socket]:
        """By the first transport that both have. Raises Unknown, OSError."""
        failed: OSError | None = None
        for transport in self._transports:
            address = peer.addresses.get(transport.name)
            if address is None or (transport.near and peer.machine != self._machine):
                continue
            try:
                return transport, transport.connect(address, peer.host, SECONDS)
            except OSError as error:
                failed = error
        if failed is not None:
            raise failed
        here, there = (", ".join(names) for names in ([one.name for one in self._transports], peer.addresses))
        raise Unknown(f"no transfer backend is common: {here} here, {there} there")


def machine_id() -> str:
    """What two processes have alike that can share memory and meet on sockets of the machine."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.stat('/proc/self/ns/net').st_ino}"
    except OSError:
        return secrets.token_hex(16)
