"""Pure ASGI: request ids, the last resort for exceptions, HEAD, the API key."""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from phloem.client.request import new_id
from phloem.core.errors import Forbidden, PhloemError, Unauthorized
from phloem.server import page
from phloem.server.bodies import header, refuse
from phloem.server.errors import error_response
from phloem.server.stream import BODY_SEND, BODY_WRITE

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

log = logging.getLogger("phloem.server")

OPEN_PATHS = page.PATHS | {"/health", "/ready", "/ping"}  # the latter are asked by supervisors that hold no key
UPDATE_PATHS = {
    *("/update_weights_from_tensor", "/update_weights_from_disk", "/update_weights_from_distributed"),
    *("/update_weights_from_ipc", "/collective_rpc", "/init_weights_update_group", "/destroy_weights_update_group"),
    *("/begin_weight_update", "/end_weight_update", "/abort_weight_update", "/post_process_weights"),
    *("/update_weight_version", "/weights_checker", "/release_memory_occupation", "/resume_memory_occupation"),
    *("/load_lora_adapter_from_tensors", "/load_lora_adapter_from_distributed"),
}
ADMIN_PATHS = UPDATE_PATHS | {
    *("/pause_generation", "/continue_generation", "/get_weights_by_name"),
    *("/flush_cache", "/reset_prefix_cache"),
    *(f"/{verb}_expert_distribution_record" for verb in ("start", "stop", "dump")),
    *("/clear_hicache_storage_backend", "/hicache/storage-backend/clear", "/start_profile", "/stop_profile"),
    "/disaggregation_mode",
    *(f"{prefix}/{verb}_lora_adapter" for prefix in ("", "/v1") for verb in ("load", "unload")),
    *("/v1/set_lora", "/v1/merge_lora_weights", "/v1/unmerge_lora_weights"),
}
_MAX_REQUEST_ID = 128
_PLAIN = re.compile(rb"[A-Za-z0-9._:-]+")


class RequestIds:
    """Outermost: gives each request an id (the client's own `x-request-id`, or a new one) and answers what no handler
    caught with 500, that id and a log line."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = header(scope, b"x-request-id")
        key = given if given is not None and _plain(given) else new_id().encode()
        scope["request_id"] = key.decode()
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if not started:
                started = True
                message = {**message, "headers": [*message.get("headers", ()), (b"x-request-id", key)]}
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        except Exception:
            log.exception("request %s (%s %s) failed", key.decode(), scope["method"], scope["path"])
            if not started:
                error = PhloemError(f"internal error; request id {key.decode()}")
                await error_response(error, scope)(scope, receive, send_with_id)


def _plain(value: bytes) -> bool:
    return 0 < len(value) <= _MAX_REQUEST_ID and _PLAIN.fullmatch(value) is not None


class Head:
    """HEAD answers as GET does, without the body."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self.app(scope, receive, send)
            return

        async def without_body(message: Message) -> None:
            if message["type"] == "http.response.body":
                message = {**message, "body": b""}
            await send(message)

        # What streams must not go past `send` either.
        past = {name: value for name, value in scope.items() if name not in (BODY_SEND, BODY_WRITE)}
        await self.app({**past, "method": "GET"}, receive, without_body)


@dataclass(frozen=True)
class Keys:
    """`admin` stands for `key` too. `remote`: other machines may change weights although there is no key."""

    key: str | None = None
    admin: str | None = None
    remote: bool = False


class ApiKey:
    """Bearer token or `x-api-key`, in constant time, on everything but health checks and the page's own files; the
    administrator's on what changes the server, where there is one. Without any key, weights are changed from this
    machine alone."""

    def __init__(self, app: ASGIApp, keys: Keys) -> None:
        self.app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        error = self._error(scope) if scope["type"] == "http" and scope["path"] not in OPEN_PATHS else None
        if error is not None:
            await refuse(error, scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _error(self, scope: Scope) -> PhloemError | None:
        keys, path = self._keys, scope["path"].rstrip("/")
        admin = keys.admin is not None and path in ADMIN_PATHS
        wanted = [keys.admin] if admin else [keys.key, keys.admin] if keys.key is not None else []
        if not wanted:
            if path in UPDATE_PATHS and keys.admin is None and not keys.remote and not _local(scope):
                return Forbidden(
                    "weights are changed from this machine alone while there is no key: set --admin-api-key, or "
                    "--allow-remote-updates"
                )
            return None
        scheme, _, token = (header(scope, b"authorization") or b"").partition(b" ")
        bearer = token.strip() if scheme.lower() == b"bearer" else b""
        given = hashlib.sha256(bearer or header(scope, b"x-api-key") or b"").digest()
        known = [hashlib.sha256(key.encode()).digest() for key in wanted if key is not None]
        if any([hmac.compare_digest(given, digest) for digest in known]):
            return None
        what = "administrator's" if admin else "API"
        return Unauthorized(f"the {what} key is missing or wrong: send Authorization: Bearer <key>")


def _local(scope: Scope) -> bool:
    client = scope.get("client")
    return client is None or client[0].startswith("127.") or client[0] in ("::1", "localhost", "testclient")
