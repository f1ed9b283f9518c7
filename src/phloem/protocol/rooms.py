"""`bootstrap_host`, `bootstrap_port` and `bootstrap_room` of bodies: where a prefill and a decode server meet."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from phloem.client.request import FAKE_HOST
from phloem.core.errors import BadRequest

if TYPE_CHECKING:
    from phloem.client.request import Item

MOST_ROOM = 2**63 - 1
_HOST = re.compile(r"[^\s\x00-\x20\x7f/\\?#@]{1,255}")
NAMES = ("bootstrap_host", "bootstrap_port", "bootstrap_room")


class Placed(Protocol):
    bootstrap_host: Any
    bootstrap_port: Any
    bootstrap_room: Any


@dataclass(frozen=True)
class Meeting:
    """A room; -1: nobody is met. `host` and `port`: of the bootstrap server, for a decode server."""

    room: int = -1
    host: str = ""
    port: int = 0


def meetings(body: Placed, count: int) -> list[Meeting]:
    """One for each of `count` prompts: of lists as long, or of one value for a single prompt. Raises BadRequest."""
    if body.bootstrap_room is None and body.bootstrap_host is None:
        return [Meeting()] * count
    hosts = _each(body.bootstrap_host, "bootstrap_host", count, alike=True)
    ports = _each(body.bootstrap_port, "bootstrap_port", count, alike=True)
    rooms = _each(body.bootstrap_room, "bootstrap_room", count, alike=False)
    return [_meeting(*parts) for parts in zip(hosts, ports, rooms, strict=True)]


def place(items: list[Item], body: Placed) -> None:
    """Tell each item whom it meets. Raises BadRequest."""
    for item, meeting in zip(items, meetings(body, len(items)), strict=True):
        item.room, item.prefill = meeting.room, (meeting.host, meeting.port)


def _each(value: Any, name: str, count: int, *, alike: bool) -> list[Any]:
    if isinstance(value, list):
        if len(value) != count:
            raise BadRequest(f"{name} has {len(value)} entries for {count} prompts", param=name)
        return value
    if count > 1 and value is not None and not alike:
        raise BadRequest(f"{name} must be a list with a room for each of {count} prompts", param=name)
    return [value] * count


def _meeting(host: Any, port: Any, room: Any) -> Meeting:
    if host is not None and (not isinstance(host, str) or not _HOST.fullmatch(host)):
        raise BadRequest("bootstrap_host is no name of a host", param="bootstrap_host")
    if port is not None and (not isinstance(port, int) or isinstance(port, bool) or not 0 < port < 65536):
        raise BadRequest("bootstrap_port is not in 1 to 65535", param="bootstrap_port")
    if room is not None and (not isinstance(room, int) or isinstance(room, bool) or not 0 <= room <= MOST_ROOM):
        raise BadRequest(f"bootstrap_room is not in 0 to {MOST_ROOM}", param="bootstrap_room")
    if room is None:
        raise BadRequest("bootstrap_room is needed beside bootstrap_host", param="bootstrap_room")
    if host == FAKE_HOST:
        return Meeting(-1, host)
    if host is not None and host[0] == "[" and host[-1] == "]":
        host = host[1:-1]  # as hosts stand in URLs, from which gateways take them
    return Meeting(room, host or "", port or 0)
