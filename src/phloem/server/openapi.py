"""The OpenAPI document: bodies and answers come from the structs that the routes decode and encode."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec
from fastapi.openapi.utils import get_openapi

from phloem.protocol.answers import Answer, ErrorAnswer
from phloem.protocol.body import Body

if TYPE_CHECKING:
    from fastapi import FastAPI

_REF = "#/components/schemas/{name}"
_ERRORS = {
    400: "The request can never succeed as it was sent; `param` names the field.",
    401: "The API key is missing or wrong.",
    404: "No such model.",
    409: "The two servers do not have the same model; the message says what differs.",
    413: "The body is over the server's limit.",
    416: "The file has no such range.",
    500: "An error of ours; the message carries the request id.",
    503: "Overloaded, draining, or the engine is not available: try again after `Retry-After` seconds.",
    507: "There is not enough memory for it.",
}
ALWAYS = (401, 500)
NEEDS_ENGINE = (503,)
TAKES_BODY = (400, 413)


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}


def _ref(kind: type) -> dict[str, str]:
    return {"$ref": _REF.format(name=kind.__name__)}


def describe(
    *,
    answer: type | dict[str, Any] | None = None,
    body: type[Body] | None = None,
    body_required: bool = True,
    form: bool = False,
    text: str | None = None,
    streams: bool = False,
    errors: tuple[int, ...] = (),
    error: type = ErrorAnswer,
    summary: str = "",
) -> dict[str, Any]:
    """Keywords for a route's decorator. `answer` is a struct or a schema; `text`: the media type of a text answer;
    `form`: the body is one."""
    content: dict[str, Any] = {}
    if answer is not None:
        content = _json(answer if isinstance(answer, dict) else _ref(answer))
    if text is not None:
        content = {text: {"schema": {"type": "string"}}}
    if streams:
        content["text/event-stream"] = {"schema": {"type": "string"}}
    codes = sorted({*ALWAYS, *errors, *(TAKES_BODY if body is not None else ())})
    responses: dict[int, Any] = {200: {"description": "Success", "content": content}}
    for code in codes:
        responses[code] = {"description": _ERRORS[code], "content": _json(_ref(error))}
    keywords: dict[str, Any] = {"responses": responses, "response_model": None}
    if summary:
        keywords["summary"] = summary
    if body is not None:
        content = {"multipart/form-data": {"schema": _ref(body)}} if form else _json(_ref(body))
        request = {"required": body_required, "content": content}
        keywords["openapi_extra"] = {"requestBody": request}
    return keywords


def _below(kind: type) -> list[type]:
    """Every body or answer of a route: the structs that no other one builds on."""
    found: list[type] = []
    for sub in kind.__subclasses__():
        if sub.__module__.startswith(("phloem.server.", "phloem.protocol.")):
            found += [sub, *_below(sub)]
    return found


def _schemas() -> dict[str, Any]:
    kinds = sorted({*_below(Body), *_below(Answer)}, key=lambda kind: kind.__name__)
    _, components = msgspec.json.schema_components(kinds, ref_template=_REF)
    for kind in kinds:
        if issubclass(kind, Body):
            _explain(kind, components[kind.__name__]["properties"])
    return components


def _explain(kind: type[Body], properties: dict[str, Any]) -> None:
    """Say at each field what is not done with it."""
    sent = dict(zip(kind.__struct_fields__, kind.__struct_encode_fields__, strict=True))
    for name, rule in kind.later.items():
        if name in properties:
            properties[name]["description"] = f"Part of {rule.feature}: refused where that does not exist yet."
    for name, reason in kind.ignored.items():
        properties[sent[name]]["description"] = f"Read and ignored: {reason}."


def document(app: FastAPI) -> dict[str, Any]:
    """Built once per app, then kept."""
    if app.openapi_schema is None:
        made = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        schemas = made.setdefault("components", {}).setdefault("schemas", {})
        for name in ("HTTPValidationError", "ValidationError"):
            schemas.pop(name, None)
        schemas.update(_schemas())
        for path in made["paths"].values():
            for operation in path.values():
                # FastAPI's own error for queries; ours answers 400 in the common shape.
                operation["responses"].pop("422", None)
        app.openapi_schema = made
    return app.openapi_schema
