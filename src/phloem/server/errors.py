"""From exceptions to answers: one shape on every route, one event in streams."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import msgspec
from starlette.exceptions import HTTPException
from starlette.responses import Response

from phloem.core.errors import BadRequest, NotFound, PhloemError
from phloem.grammar.schema.numbers import as_double
from phloem.protocol.answers import Error, ErrorAnswer, MessagesError, MessagesErrorAnswer

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.types import Scope

log = logging.getLogger("phloem.server")

RETRY_AFTER = "1"  # seconds; queues move in steps of milliseconds
MESSAGES_PATH = "/v1/messages"
THREADS = "thread_unsupported_request"  # the code that clients know
_MESSAGES_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
_encode = msgspec.json.Encoder(enc_hook=as_double).encode


def error_body(error: PhloemError) -> bytes:
    """`{"error": {...}}` as the `openai` client and native clients read it."""
    code = error.code if error.code is not None else error.status
    return _encode(
        ErrorAnswer(
            error=Error(message=error.message, type=error.kind, param=error.param, code=code, retryable=error.retryable)
        )
    )


def messages_error(error: PhloemError, request_id: str | None) -> MessagesErrorAnswer:
    """The shape of the routes under `/v1/messages`."""
    kind = _MESSAGES_KINDS.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    told = MessagesError(type=kind, message=error.message)
    if error.code == THREADS:
        told.details = {"error_code": error.code, "unsupported": [error.param or ""]}
    return MessagesErrorAnswer(error=told, request_id=request_id)


def error_response(error: PhloemError, scope: Scope) -> Response:
    """The answer to the request of this scope, in its route's shape."""
    headers: dict[str, str] = {}
    if error.status == 503:
        headers["retry-after"] = RETRY_AFTER if error.retry_after is None else str(error.retry_after)
    if error.status == 408:
        headers["connection"] = "close"  # what may still come is no request
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    body = error_body(error)
    if scope["path"].startswith(MESSAGES_PATH):
        body = _encode(messages_error(error, scope.get("request_id")))
    return Response(body, error.status, headers, media_type="application/json")


async def on_phloem_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, PhloemError)
    if error.status >= 500 and error.status != 503:
        log.error("request %s: %s", request.scope.get("request_id", "?"), error.message)
    return error_response(error, request.scope)


async def on_http_error(request: Request, error: Exception) -> Response:
    """Starlette's own: unknown paths and methods."""
    assert isinstance(error, HTTPException)
    shaped: PhloemError = NotFound("there is no such path") if error.status_code == 404 else BadRequest(error.detail)
    shaped.status = error.status_code
    response = error_response(shaped, request.scope)
    for name, value in (error.headers or {}).items():
        response.headers[name] = value
    return response


async def on_invalid_query(request: Request, error: Exception) -> Response:
    """FastAPI's check of query parameters."""
    problems = getattr(error, "errors", lambda: [])()
    first = problems[0] if problems else {"loc": ("query",), "msg": str(error)}
    name = str(first["loc"][-1])
    return error_response(BadRequest(f"{name}: {first['msg']}", param=name, code="invalid_value"), request.scope)
