"""`kv_transfer_params` of bodies and answers, as vLLM's gateways speak of a prefill and a decode server.

Such a gateway asks the prefill server first (`do_remote_decode`), waits for its answer, and puts what stands there
under `kv_transfer_params` into what it asks of the decode server (`do_remote_prefill`). Here both halves are a room:
the prefill server chooses it, and its name goes through the gateway as `remote_request_id`.
"""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec import UNSET, UnsetType

from phloem.core.errors import BadRequest
from phloem.protocol.rooms import MOST_ROOM

if TYPE_CHECKING:
    from fastapi import Request

    from phloem.protocol.fields import OpenAIBody
    from phloem.server.door import Door

NAME = "kv_transfer_params"
EVERYWHERE = ("0.0.0.0", "::", "")


class Params(msgspec.Struct, kw_only=True):
    """What is read of them; gateways may say more, and what they say of vLLM's blocks means nothing here."""

    do_remote_decode: bool | None = None
    do_remote_prefill: bool | None = None
    remote_host: str | None = None
    remote_port: int | None = None
    remote_request_id: str | None = None


def meet(body: OpenAIBody, door: Door) -> None:
    """Put the room that the parameters speak of into the body's own fields. Raises BadRequest, naming what is wrong."""
    if body.kv_transfer_params is None:
        return
    try:
        told = msgspec.convert(body.kv_transfer_params, Params)
    except msgspec.ValidationError as error:
        raise BadRequest(f"{NAME}: {error}", param=NAME) from None
    if not told.do_remote_decode and not told.do_remote_prefill:
        return
    if body.bootstrap_room is not None or body.bootstrap_host is not None:
        raise BadRequest(f"{NAME}: bootstrap_room says where to meet already", param=NAME)
    name, role = ("do_remote_decode", "prefill") if told.do_remote_decode else ("do_remote_prefill", "decode")
    if told.do_remote_decode and told.do_remote_prefill:
        raise BadRequest(f"{NAME}: do_remote_decode and do_remote_prefill exclude each other", param=NAME)
    if door.info.role != role:
        here = "does both" if door.info.role == "null" else f"is a {door.info.role} server"
        raise BadRequest(f"{NAME}: {name} is for a {role} server, and this one {here}", param=NAME)
    if told.do_remote_decode:
        if body.stream:
            raise BadRequest(f"{NAME}: do_remote_decode is answered as a whole (stream)", param=NAME)
        body.bootstrap_room = secrets.randbelow(MOST_ROOM)
        return
    room = told.remote_request_id or ""
    if not (room.isascii() and room.isdigit() and int(room[:20]) <= MOST_ROOM) or told.remote_host is None:
        text = "remote_host and remote_request_id must be those of a prefill server's answer"
        raise BadRequest(f"{NAME}: {text}", param=NAME)
    body.bootstrap_host, body.bootstrap_port, body.bootstrap_room = told.remote_host, told.remote_port, int(room)


def offered(body: OpenAIBody, door: Door, request: Request) -> dict[str, Any] | UnsetType:
    """What a prefill server's answer says to the decode server; UNSET: nobody has asked for it."""
    asked = body.kv_transfer_params
    if not isinstance(asked, dict) or not asked.get("do_remote_decode"):
        return UNSET
    host = door.config.server.host
    told = (door.client.connection.ready or {}).get("disaggregation") or {}
    return {
        "do_remote_prefill": True,
        "do_remote_decode": False,
        "remote_engine_id": door.info.served_model_name,
        "remote_block_ids": [],
        "remote_host": (request.url.hostname or host) if host in EVERYWHERE else host,
        "remote_port": told.get("bootstrap_port"),
        "remote_request_id": str(body.bootstrap_room),
        "tp_size": door.config.runtime.tp_size,
    }
