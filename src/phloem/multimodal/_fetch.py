"""The bytes of a picture, video, sound or document from where a client says it is: in the request, at an address, in a
file.

Addresses are fetched only where that is switched on, and never inside the own network: a name is resolved once, every
address it has must be globally routable, and that very address is dialled, so that a second look-up can give no other.
Redirects are followed three times at most, each under the same rules. Proxies of the environment are not asked.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import http.client
import io
import ipaddress
import socket
import ssl
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import quote, unquote, unquote_to_bytes, urljoin, urlsplit

from phloem.core.errors import BadRequest

if TYPE_CHECKING:
    from collections.abc import Callable

MOST_BYTES = 25 << 20
CONNECT_SECONDS, WHOLE_SECONDS, REDIRECTS = 5.0, 15.0, 3
_AS_IS = "%/:=&?~#+!$,;'@()*[]"  # of a target: letters that are not those of addresses alone are quoted
JPEG = "/9j/"  # how every JPEG begins in base64; it is no path
_TUNNELS = [ipaddress.ip_network(net) for net in ("64:ff9b::/96", "64:ff9b:1::/48", "2002::/16", "2001::/32")]


def routable(address: str) -> bool:
    """Whether an address belongs to the public network: no loopback, private, link-local, multicast or reserved one."""
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(found, ipaddress.IPv6Address):
        if found.ipv4_mapped is not None:
            found = found.ipv4_mapped
        elif any(found in net for net in _TUNNELS):
            return False
    return found.is_global and not found.is_multicast and not found.is_reserved


@dataclass(frozen=True)
class Rules:
    """What a client may name. `routable`: which addresses may be dialled."""

    urls: bool = False
    root: Path | None = None
    routable: Callable[[str], bool] = routable


def fetch(source: str, where: str, rules: Rules) -> bytes:
    """The bytes of a data URI, of bare base64, of an http(s) address, or of a file.

    Raises:
        BadRequest: naming the field `where`, for whatever cannot be had or may not be.
    """
    kind = source[:8].lower()
    if source.startswith(JPEG):
        return as_base64(source, where)
    if kind.startswith("data:"):
        return _data(source, where)
    if is_address(source):
        if not rules.urls:
            _refuse(where, "addresses are not fetched here (--enable-mm-urls); send a data URI")
        return _over_http(source, where, rules)
    if kind.startswith("file://") or source.startswith(("/", "./", "~")):
        return _file(source, where, rules)
    if "://" in source[:16]:
        _refuse(where, f"unknown kind of address {source.partition('://')[0]!r:.40}")
    return as_base64(source, where)


def is_address(source: str) -> bool:
    """Whether its bytes come over the network."""
    return source[:8].lower().startswith(("http://", "https://"))


def _refuse(where: str, why: str, code: str = "bad_image") -> None:
    raise BadRequest(f"{where}: {why}", param=where, code=code)


def as_base64(text: str, where: str) -> bytes:
    """Line breaks between the letters are left out. Raises BadRequest."""
    if any(space in text for space in " \r\n"):
        text = "".join(text.split())
    if len(text) > MOST_BYTES * 4 // 3 + 4:
        _refuse(where, f"more than {MOST_BYTES >> 20} MiB", "too_large")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise BadRequest(f"{where}: no valid base64", param=where, code="bad_image") from None


def _data(source: str, where: str) -> bytes:
    head, comma, body = source.partition(",")
    if not comma:
        _refuse(where, "a data URI without data")
    return as_base64(body, where) if head.lower().endswith(";base64") else unquote_to_bytes(body)


def _file(source: str, where: str, rules: Rules) -> bytes:
    if rules.root is None:
        _refuse(where, "files are not read here (--mm-file-root)")
        return b""
    root = rules.root.expanduser().resolve()
    name = unquote(source[7:]) if source[:7].lower() == "file://" else source
    try:
        path = Path(name).expanduser()
        path = (path if path.is_absolute() else root / path).resolve(strict=True)
        if not path.is_relative_to(root) or not path.is_file():
            raise OSError
        if path.stat().st_size > MOST_BYTES:
            _refuse(where, f"more than {MOST_BYTES >> 20} MiB", "too_large")
        return path.read_bytes()
    except (OSError, ValueError, RuntimeError):  # the last: nobody's home
        # The same words for what is not there and what may not be read.
        raise BadRequest(f"{where}: there is no such file below the root", param=where, code="bad_image") from None


def _over_http(url: str, where: str, rules: Rules) -> bytes:
    deadline = time.monotonic() + WHOLE_SECONDS
    for _ in range(REDIRECTS + 1):
        found = _once(url, where, rules, deadline)
        if isinstance(found, bytes):
            return found
        try:
            url = urljoin(url, found)
        except ValueError:
            break
    raise BadRequest(f"{where}: more than {REDIRECTS} redirects, or one to no address", param=where, code="bad_image")


def _once(url: str, where: str, rules: Rules, deadline: float) -> bytes | str:
    """The body, or where it is said to be instead."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError:
        host, port, parts = None, 0, urlsplit("")
    if parts.scheme not in ("http", "https") or not host or parts.username is not None:
        raise BadRequest(f"{where}: no address that is fetched", param=where, code="bad_image")
    try:
        address = _address(host, port, where, rules)
        sock = socket.create_connection((address, port), min(CONNECT_SECONDS, _left(deadline)))
        with contextlib.ExitStack() as stack:
            stack.enter_context(sock)
            if parts.scheme == "https":
                sock.settimeout(_left(deadline))
                sock = stack.enter_context(ssl.create_default_context().wrap_socket(sock, server_hostname=host))
            connection = http.client.HTTPConnection(host, port)
            connection.sock = cast("Any", _Timed(sock, deadline))
            target = quote((parts.path or "/") + (f"?{parts.query}" if parts.query else ""), safe=_AS_IS)
            connection.request("GET", target, headers={"Accept": "*/*", "User-Agent": "phloem"})
            answer = connection.getresponse()
            if answer.status in (301, 302, 303, 307, 308):
                return answer.headers.get("Location") or ""
            if answer.status != 200:
                raise BadRequest(f"{where}: the address answered {answer.status}", param=where, code="bad_image")
            return _body(answer, where)
    except TimeoutError:
        raise BadRequest(f"{where}: the address is too slow", param=where, code="bad_image") from None
    except (OSError, http.client.HTTPException, UnicodeError, ValueError) as error:
        reason = type(error).__name__
        raise BadRequest(f"{where}: the address gave nothing ({reason})", param=where, code="bad_image") from None


def _address(host: str, port: int, where: str, rules: Rules) -> str:
    """The one that is dialled."""
    found = [str(info[4][0]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    if not found or not all(rules.routable(address) for address in found):
        raise BadRequest(f"{where}: that address is not fetched", param=where, code="refused_address")
    return found[0]


def _body(answer: http.client.HTTPResponse, where: str) -> bytes:
    data = bytearray()
    while piece := answer.read1(1 << 16):
        data += piece
        if len(data) > MOST_BYTES:
            _refuse(where, f"more than {MOST_BYTES >> 20} MiB", "too_large")
    return bytes(data)


def _left(deadline: float) -> float:
    """Seconds. Raises TimeoutError where there are none."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


class _Timed(io.RawIOBase):
    """A socket as `http.client` takes it: whatever is sent or read, headers too, until the deadline and no longer."""

    def __init__(self, sock: socket.socket, deadline: float) -> None:
        super().__init__()
        self._sock, self._deadline = sock, deadline

    def makefile(self, *_: Any) -> io.BufferedReader:
        return io.BufferedReader(self)

    def sendall(self, data: bytes) -> None:
        self._sock.settimeout(_left(self._deadline))
        self._sock.sendall(data)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        self._sock.settimeout(_left(self._deadline))
        return self._sock.recv_into(buffer)

    def close(self) -> None:
        """Nothing: `http.client` closes before the body has been read, and whoever dialled closes the socket."""
