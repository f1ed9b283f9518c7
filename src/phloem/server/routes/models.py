"""`GET /v1/models` and `/v1/models/{id}`."""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter, Request
from starlette.responses import Response

from phloem.protocol.answers import Answer
from phloem.server.door import Door, door_of, json_response
from phloem.server.openapi import describe


class ModelCard(Answer, kw_only=True):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "phloem"
    root: str
    parent: str | None = None  # of an adapter: the model that it stands beside
    max_model_len: int
    task: str


class ModelList(Answer, kw_only=True):
    object: Literal["list"] = "list"
    data: list[ModelCard]


router = APIRouter(tags=["openai"])


def _card(door: Door, adapter: str = "") -> ModelCard:
    info, base = door.info, door.info.served_model_name
    # smg tells by the owner how the servers of a pair are to be spoken to: ours as SGLang's are.
    owner = "phloem" if info.role == "null" else "sglang"
    return ModelCard(
        id=adapter or base,
        created=info.created,
        owned_by=owner,
        root=door.adapters[adapter] if adapter else info.model_path,
        parent=base if adapter else None,
        max_model_len=info.context_length,
        task=info.task,
    )


@router.get("/v1/models", **describe(answer=ModelList))
async def models(request: Request) -> Response:
    """The models that this server serves: the base, then its adapters."""
    door = door_of(request)
    return json_response(ModelList(data=[_card(door), *(_card(door, name) for name in door.adapters)]))


@router.get("/v1/models/{name:path}", **describe(answer=ModelCard, errors=(404,)))
async def model(request: Request, name: str) -> Response:
    """One model."""
    door = door_of(request)
    if not name:  # of a client that joins paths with a slash
        return await models(request)
    return json_response(_card(door, door.check_model(name)))
