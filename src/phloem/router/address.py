"""Addresses of servers, in one spelling each."""

from __future__ import annotations

import ipaddress
import re
from urllib.parse import urlsplit

from phloem.core.errors import BadRequest

_NAME = re.compile(r"[A-Za-z0-9._-]{1,253}")


def _host(name: str) -> str:
    """As it is looked up and written into headers. Raises ValueError."""
    if ":" in name:
        return str(ipaddress.IPv6Address(name))
    host = name.encode("idna").decode("ascii")
    if not _NAME.fullmatch(host):
        raise ValueError("that is no name of a host")
    return host


def parse_url(url: str) -> tuple[str, str, int]:
    """The address in one spelling, its host and port. Raises BadRequest."""
    text = url.strip()
    try:
        found = urlsplit(text if "://" in text else f"http://{text}")
        port = 80 if found.port is None else found.port
        if found.scheme != "http" or not found.hostname or found.path.strip("/") or found.query or found.username:
            raise ValueError("that is not http://host:port")
        host = _host(found.hostname)
        if not port:
            raise ValueError("port 0 is none that is listened on")
    except ValueError as error:
        raise BadRequest(f"worker url {url!r:.200}: {error}", param="url") from None
    return f"http://{f'[{host}]' if ':' in host else host}:{port}", host, port
